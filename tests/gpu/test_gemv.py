"""Products of few rows at the shapes of real models' layers, against float32 products of the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from runtime.kernels.gpu.gemv import gemv

pytestmark = pytest.mark.gpu
LAYERS = {
    "qkv": (6144, 4096),
    "output": (4096, 4096),
    "gate and up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
    "Qwen2.5-0.5B's down": (896, 4864),
    "Llama-3-70B's gate and up on one of four GPUs": (14336, 8192),
    "Llama-3-70B's down on one of four GPUs": (8192, 7168),
    "Baichuan-13B's gate and up": (27392, 5120),
}
ROWS = [1, 2, 8, 13, 16]


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T in double precision, a part of the outputs at a time."""
    return torch.cat([x.double() @ part.double().T for part in weight.split(4096)], dim=-1)


@pytest.mark.parametrize(
    ("layer", "dtype"), [*((layer, torch.bfloat16) for layer in LAYERS), ("qkv", torch.float16)]
)
def test_layers(layer: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    out_features, in_features = LAYERS[layer]
    weight = (torch.randn(out_features, in_features, device="cuda") / in_features**0.5).to(dtype)
    rows = torch.randn(max(ROWS), in_features, device="cuda").to(dtype)
    expected = product(rows, weight)
    gates, ups = expected.chunk(2, dim=-1)
    for num_rows in ROWS:
        x = rows[:num_rows]
        out = gemv(x, weight, torch.empty(num_rows, out_features, device="cuda"))
        gated = torch.empty(num_rows, out_features // 2, device="cuda")
        gemv(x, weight, gated, silu_mul=True)

        # Float32 sums of thousands of products of about 1 / sqrt(in_features).
        torch.testing.assert_close(out.double(), expected[:num_rows], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(gated.double(), (F.silu(gates) * ups)[:num_rows], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("num_rows", ROWS)
def test_bf16_out_with_bias_and_residual(num_rows: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(num_rows, 4096, device="cuda").bfloat16()
    weight = (torch.randn(4096, 4096, device="cuda") / 64).bfloat16()
    bias = torch.randn(4096, device="cuda").bfloat16()
    residual = torch.randn(num_rows, 4096, device="cuda").bfloat16()
    expected = product(x, weight) + bias.double() + residual.double()

    gemv(x, weight, residual, bias, residual)

    # Rounded once: half a unit in the last of 8 bits, and float32's own error.
    torch.testing.assert_close(residual.double(), expected, atol=2e-4, rtol=0.51 * 2**-7)


@pytest.mark.parametrize("num_rows", [1, 8])
def test_the_same_every_time_and_in_a_graph(num_rows: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(num_rows, 4096, device="cuda").bfloat16()
    weight = (torch.randn(6144, 4096, device="cuda") / 64).bfloat16()
    out = torch.empty(num_rows, 6144, device="cuda").bfloat16()
    first = gemv(x, weight, out).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gemv(x, weight, out)
    for _ in range(20):
        out.zero_()
        graph.replay()
        assert torch.equal(out, first)


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("inputs", [4096, 3608, 1001])
def test_each_of_a_chain_waits_for_the_one_before(num_rows: int, inputs: int) -> None:
    torch.manual_seed(0)
    weights = (torch.randn(40, inputs, inputs, device="cuda") / inputs**0.5).bfloat16()
    x = torch.randn(num_rows, inputs, device="cuda").bfloat16()

    def chain(between: Callable[[], None] = lambda: None) -> torch.Tensor:
        y = x
        for weight in weights:
            between()
            y = gemv(y, weight, torch.empty_like(y))
        return y

    expected = chain(torch.cuda.synchronize)
    assert torch.equal(chain(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
    for _ in range(20):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)
