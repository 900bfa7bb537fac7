"""RMSNorm as transformers computes it, with the residual carried along."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from runtime.kernels.gpu.norm import add_rms_norm, add_rms_norm_torch, head_rms_norm
from runtime.kernels.norm import head_rms_norm_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5


@pytest.mark.parametrize("norm", [add_rms_norm, add_rms_norm_torch])
@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize("hidden_size", [64, 80])
def test_against_transformers(norm, gemma: bool, hidden_size: int) -> None:
    torch.manual_seed(0)
    reference = (Gemma2RMSNorm if gemma else LlamaRMSNorm)(hidden_size, eps=EPS).to(DEVICE)
    weight = torch.randn(hidden_size, device=DEVICE)
    reference.weight.data.copy_(weight)
    x, residual = torch.randn(2, 3, hidden_size, device=DEVICE).unbind()
    total = x + residual
    out = torch.empty_like(residual)

    norm(x, residual, weight, EPS, out, gemma)

    torch.testing.assert_close(residual, total)
    torch.testing.assert_close(out, reference(total).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", [add_rms_norm, add_rms_norm_torch])
def test_without_an_addend_the_residual_stays(norm) -> None:
    torch.manual_seed(1)
    residual = torch.randn(2, 48, device=DEVICE)
    before, weight = residual.clone(), torch.ones(48, device=DEVICE)

    out = norm(None, residual, weight, EPS, torch.empty_like(residual))

    assert torch.equal(residual, before)
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(before, (48,), eps=EPS))


@pytest.mark.parametrize("norm", [add_rms_norm, add_rms_norm_torch])
def test_half_precision_is_rounded_once(norm) -> None:
    """The sum is rounded, as the next layer adds to it; the norm of that sum is exact till the end."""
    torch.manual_seed(2)
    x, residual = torch.randn(2, 4, 96, device=DEVICE).half().unbind()
    weight = torch.randn(96, device=DEVICE)
    total = x + residual
    wide = total.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()

    out = norm(x, residual.clone(), weight, EPS, torch.empty_like(x))

    # Half a unit in the last of 11 bits, and a little for the float32 arithmetic.
    torch.testing.assert_close(out.double(), exact, rtol=0.502 * 2**-10, atol=1e-7)


@pytest.mark.parametrize("norm", [add_rms_norm, add_rms_norm_torch])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_addend_that_is_normed_itself(norm, dtype: torch.dtype) -> None:
    """As if it had been normed, and rounded, before."""
    torch.manual_seed(4)
    x, residual = torch.randn(2, 3, 80, device=DEVICE).to(dtype).unbind()
    weight, x_weight = torch.randn(2, 80, device=DEVICE).unbind()
    normed = norm(None, x, x_weight, EPS, torch.empty_like(x))
    total = residual.clone()
    expected = norm(normed, total, weight, EPS, torch.empty_like(x))

    out = norm(x, residual, weight, EPS, torch.empty_like(x), x_weight=x_weight)

    assert torch.equal(out, expected)
    assert torch.equal(residual, total)


@pytest.mark.parametrize("norm", [head_rms_norm, head_rms_norm_torch])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (6, 1, 20), (40, 8, 128)])
def test_queries_and_keys_are_normed_by_heads_and_values_left_alone(
    norm, heads: int, kv_heads: int, head_dim: int
) -> None:
    torch.manual_seed(3)
    q_norm, k_norm = (Qwen3RMSNorm(head_dim, eps=EPS).to(DEVICE) for _ in range(2))
    for reference in (q_norm, k_norm):
        reference.weight.data.normal_()
    qkv = torch.randn(3, (heads + 2 * kv_heads) * head_dim, device=DEVICE)
    queries, keys, values = qkv.unflatten(1, (-1, head_dim)).split((heads, kv_heads, kv_heads), dim=1)
    expected = torch.cat((q_norm(queries), k_norm(keys), values), dim=1).flatten(1).detach()

    norm(qkv, q_norm.weight.detach(), k_norm.weight.detach(), EPS, heads)

    torch.testing.assert_close(qkv, expected, atol=1e-5, rtol=1e-5)
