"""Norms, activations, rotary embedding and token embedding at real models' sizes, in bf16."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from runtime.kernels.gpu.activation import gelu_tanh_mul, gelu_tanh_mul_torch, silu_mul, silu_mul_torch
from runtime.kernels.gpu.embedding import embedding, embedding_torch
from runtime.kernels.gpu.norm import add_rms_norm, add_rms_norm_torch
from runtime.kernels.gpu.rotary import rotary_store, rotary_store_torch

pytestmark = pytest.mark.gpu
# The same float32 arithmetic in another order may round to the neighbouring bf16.
ULP = 2**-7
TOKENS = [1, 7, 256, 4000]


def bf16(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("hidden_size", [896, 4096, 5120, 8192])
@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_norm(num_tokens: int, hidden_size: int, gemma: bool, adds: bool) -> None:
    torch.manual_seed(0)
    x = bf16(num_tokens, hidden_size) if adds else None
    residual, weight = bf16(num_tokens, hidden_size, scale=3), bf16(hidden_size)
    other = residual.clone()

    out = add_rms_norm(x, residual, weight, 1e-5, torch.empty_like(residual), gemma)
    expected = add_rms_norm_torch(x, other, weight, 1e-5, torch.empty_like(residual), gemma)

    assert torch.equal(residual, other)
    torch.testing.assert_close(out, expected, rtol=ULP, atol=1e-6)


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("inner", [4864, 13696, 14336])
@pytest.mark.parametrize(
    ("activate", "twin"), [(silu_mul, silu_mul_torch), (gelu_tanh_mul, gelu_tanh_mul_torch)]
)
def test_activation(activate, twin, num_tokens: int, inner: int) -> None:
    torch.manual_seed(0)
    gate_up = bf16(num_tokens, 2 * inner, scale=5)

    out = activate(gate_up, torch.empty(num_tokens, inner, device="cuda", dtype=torch.bfloat16))

    expected = twin(gate_up, torch.empty_like(out))
    # Where the gate all but closes, 1 + tanh cancels: what is left is a unit in the last place of 1, times
    # half the gate (about 8 there) and the other input (up to 25).
    torch.testing.assert_close(out, expected, rtol=ULP, atol=100 * 2**-23)


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "rotary_dim"),
    [
        (32, 8, 128, 128),
        (14, 2, 64, 64),
        (32, 2, 128, 64),
        (40, 40, 128, 0),
        (16, 8, 256, 256),
        (32, 32, 80, 32),
    ],
)
def test_rotary(
    num_tokens: int, interleaved: bool, num_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int
) -> None:
    torch.manual_seed(0)
    block_size = 16
    num_blocks = num_tokens // block_size + 2
    qkv = bf16(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    angles = torch.rand(8192, rotary_dim // 2, device="cuda") * 7
    cos_sin = torch.stack((angles.cos(), angles.sin()), dim=1) if rotary_dim else None
    positions = torch.randint(8192, (num_tokens,), dtype=torch.int32, device="cuda")
    slots = torch.randperm(num_blocks * block_size, device="cuda")[:num_tokens].int()
    slots[num_tokens // 2] = -1
    results = []
    for store in (rotary_store, rotary_store_torch):
        packed = qkv.clone()
        cache = torch.zeros(2, num_blocks, num_kv_heads, block_size, head_dim, device="cuda").bfloat16()
        store(packed, cos_sin, positions, slots, cache[0], cache[1], num_heads, interleaved)
        results.append((packed, cache))

    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=ULP, atol=2**-9)


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_embedding(num_tokens: int) -> None:
    torch.manual_seed(0)
    table = bf16(128256 // 4, 4096)
    ids = torch.randint(128256, (num_tokens,), dtype=torch.int32, device="cuda")
    out = torch.empty(num_tokens, 4096, dtype=torch.bfloat16, device="cuda")

    found = embedding(ids, table, out, first_id=128256 // 4, scale=61.9)

    assert torch.equal(found, embedding_torch(ids, table, torch.empty_like(out), 128256 // 4, 61.9))
