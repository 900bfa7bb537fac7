"""Linear layers over quantised weights: however a number of rows is multiplied, it is the same product."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from runtime.kernels import packed_linear
from runtime.kernels.activation import silu_mul_torch
from runtime.kernels.linear import linear, silu_linear
from runtime.kernels.packed import dequantize_torch
from runtime.kernels.packed_linear import PackedLinear
from tests.runtime.kernels.packed_matrices import random_matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@pytest.mark.parametrize("num_rows", [0, 1, 5, 20, 70])
@pytest.mark.parametrize("ordered", [False, True])
def test_rows_few_and_many(num_rows: int, ordered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "DEQUANTIZE_ROWS", 64)
    if DEVICE == "cpu":
        monkeypatch.setattr(packed_linear, "_size", lambda device: (8, 227 << 10))
        # The CPU's own kernel takes float32 alone.
        monkeypatch.setattr(packed_linear, "silu_mul", silu_mul_torch)
    torch.manual_seed(0)
    matrix = random_matrix("int4", 32, 128, 32, True, device=DEVICE)
    weight = dequantize_torch(matrix, torch.float64)
    if ordered:
        order = torch.randperm(128, device=DEVICE)
        matrix, weight = replace(matrix, order=order), weight[:, torch.argsort(order)]
    x, bias = torch.randn(num_rows, 128, device=DEVICE).half(), torch.randn(32, device=DEVICE).half()
    weights = PackedLinear(matrix, bias)
    expected = F.linear(x.double(), weight, bias.double())
    gate, up = expected.chunk(2, -1)

    torch.testing.assert_close(linear(x, weights).double(), expected, atol=4e-3, rtol=4e-3)
    torch.testing.assert_close(silu_linear(x, weights).double(), F.silu(gate) * up, atol=8e-3, rtol=8e-3)
