"""Gated activations as transformers' MLPs compute them."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from runtime.kernels.gpu.activation import (
    gelu_tanh_mul,
    gelu_tanh_mul_torch,
    silu_mul,
    silu_mul_torch,
    softcap,
    softcap_torch,
)

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's numpy
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("activate", "name"),
    [
        (silu_mul, "silu"),
        (silu_mul_torch, "silu"),
        (gelu_tanh_mul, "gelu_pytorch_tanh"),
        (gelu_tanh_mul_torch, "gelu_pytorch_tanh"),
    ],
)
@pytest.mark.parametrize("n", [24, 1100])
def test_against_transformers(activate, name: str, n: int) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(3, 2 * n, device=DEVICE) * 4
    gate_up[0, :4] = torch.tensor([0.0, 90.0, -90.0, -1e4])  # where a careless sigmoid overflows
    gate, up = gate_up.chunk(2, dim=-1)

    out = activate(gate_up, torch.empty(3, n, device=DEVICE))

    torch.testing.assert_close(out, ACT2FN[name](gate) * up, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cap", [softcap, softcap_torch])
def test_logits_stay_within_their_cap(cap) -> None:
    torch.manual_seed(1)
    logits = torch.randn(3, 700, device=DEVICE) * 40
    logits[0, :4] = torch.tensor([0.0, 9e3, -9e3, float("-inf")])
    expected = 30.0 * torch.tanh(logits.double() / 30.0)

    out = cap(logits, 30.0)

    assert out is logits
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
