"""The gated activations of the MLP, and the soft cap of logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from runtime.kernels.gpu.early import begin, early_launch
from runtime.kernels.gpu.language import tl, triton
from runtime.kernels.gpu.launch import cdiv, kernel

_BLOCK = 1024


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """gate_up [m, 2 n], gates then ups -> out [m, n]: silu(gate) * up. Both are contiguous."""
    return _gated(gate_up, out, gelu=False)


def gelu_tanh_mul(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """As `silu_mul` with GELU in its tanh approximation (Hendrycks and Gimpel, 2016)."""
    return _gated(gate_up, out, gelu=True)


def _gated(gate_up: torch.Tensor, out: torch.Tensor, gelu: bool) -> torch.Tensor:
    m, n = out.shape
    _gated_kernel[(m, cdiv(n, _BLOCK))](
        gate_up, out, N=n, BLOCK=_BLOCK, GELU=gelu, num_warps=4, **early_launch()
    )
    return out


@kernel
@triton.jit
def _gated_kernel(
    gate_up_ptr, out_ptr, N: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr, EARLY: tl.constexpr
):
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < N
    gate = tl.load(gate_up_ptr + row * 2 * N + column, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * N + N + column, mask, other=0.0).to(tl.float32)
    activated = gelu_tanh(gate) if GELU else silu(gate)
    tl.store(out_ptr + row * N + column, activated * up, mask)


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """x, contiguous float32, becomes cap * tanh(x / cap); returns it."""
    _softcap_kernel[(cdiv(x.numel(), _BLOCK),)](
        x, x.numel(), cap, BLOCK=_BLOCK, num_warps=4, **early_launch()
    )
    return x


@kernel
@triton.jit(do_not_specialize=["count"])
def _softcap_kernel(x_ptr, count, cap, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    begin(EARLY)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, place < count, other=0.0)
    # tanh(y) = 1 - 2 / (exp(2 y) + 1), exact at both ends of exp's range.
    tl.store(x_ptr + place, cap - 2.0 * cap / (tl.exp(x * (2.0 / cap)) + 1.0), place < count)


@triton.jit
def silu(x):
    """x * sigmoid(x), x float32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu_tanh(x):
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), x float32; (1 + tanh y) / 2 = sigmoid(2 y)."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


def silu_mul_torch(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The plain twin of `silu_mul`."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return out.copy_(F.silu(gate) * up)


def gelu_tanh_mul_torch(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The plain twin of `gelu_tanh_mul`."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return out.copy_(F.gelu(gate, approximate="tanh") * up)


def softcap_torch(x: torch.Tensor, cap: float) -> torch.Tensor:
    """The plain twin of `softcap`."""
    return x.div_(cap).tanh_().mul_(cap)
