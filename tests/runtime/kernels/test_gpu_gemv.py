"""Products of few rows against torch's in double precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from runtime.kernels.gpu.gemv import GemvConfig, gemv, gemv_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


def small_tiles(x: torch.Tensor, weight: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """The kernels, with tiles that fit neither the outputs nor the inputs."""
    return gemv(x, weight, *args, config=GemvConfig(16, 64, 4, 2), **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("multiply", [gemv, small_tiles, gemv_torch])
@pytest.mark.parametrize("num_rows", [1, 2, 16])
@pytest.mark.parametrize("activation", [None, "silu_mul", "gelu_tanh_mul"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_against_torch(multiply, num_rows: int, activation: str | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    in_features, out_features = 152, 84
    x = torch.randn(num_rows, in_features, device=DEVICE).to(dtype)
    weight = (torch.randn(out_features, in_features, device=DEVICE) / in_features**0.5).to(dtype)
    expected = F.linear(x.double(), weight.double())
    if activation:
        gate, up = expected.chunk(2, dim=-1)
        activated = F.silu(gate) if activation == "silu_mul" else F.gelu(gate, approximate="tanh")
        expected = activated * up

    how = {activation: True} if activation else {}
    out = multiply(x, weight, torch.empty(expected.shape, device=DEVICE), **how)

    # The GPU's tensor cores round float32 operands to 10 bits.
    tolerance = 1e-2 if DEVICE == "cuda" and dtype == torch.float32 else 1e-5
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("multiply", [gemv, gemv_torch])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_bias_and_residual_in_place(multiply, num_rows: int) -> None:
    torch.manual_seed(1)
    x = torch.randn(num_rows, 64, device=DEVICE).half()
    weight = torch.randn(40, 64, device=DEVICE).half()
    bias = torch.randn(40, device=DEVICE).half()
    residual = torch.randn(num_rows, 40, device=DEVICE).half()
    linear = F.linear(x.double(), weight.double(), bias.double())
    gate, up = linear.chunk(2, dim=-1)

    gated = multiply(x, weight, torch.empty(num_rows, 20, device=DEVICE), bias, silu_mul=True)
    expected = linear + residual.double()
    out = multiply(x, weight, residual, bias, residual)

    assert out is residual
    # Half a unit in the last of 11 bits.
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0.51 * 2**-10)
    torch.testing.assert_close(gated.double(), F.silu(gate) * up, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_rows", [0, 17])
def test_only_few_rows(num_rows: int) -> None:
    weight = torch.zeros(32, 32, device=DEVICE)
    rows = torch.zeros(num_rows, 32, device=DEVICE)
    with pytest.raises(ValueError, match=f"1 to 16 rows, not {num_rows}"):
        gemv(rows, weight, torch.empty_like(rows))
