"""The gated activations of the MLP, and the soft cap of logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from runtime.kernels import native


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[m, 2 n], gates then ups -> [m, n]: silu(gate) * up."""
    if gate_up.device.type == "cuda":
        from runtime.kernels.gpu import activation

        return activation.silu_mul(gate_up, gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2)))
    lib = native.library() if gate_up.device.type == "cpu" else None
    if lib is None:
        return silu_mul_torch(gate_up)
    m, n = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((m, n))
    lib.silu_mul(gate_up.data_ptr(), m, n, out.data_ptr())
    return out


def gelu_tanh_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As `silu_mul` with GELU in its tanh approximation (Hendrycks and Gimpel, 2016)."""
    if gate_up.device.type == "cuda":
        from runtime.kernels.gpu import activation

        return activation.gelu_tanh_mul(gate_up, gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2)))
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """x, contiguous float32, becomes cap * tanh(x / cap); returns it."""
    if x.device.type == "cuda":
        from runtime.kernels.gpu import activation

        return activation.softcap(x, cap)
    return x.div_(cap).tanh_().mul_(cap)


def silu_mul_torch(gate_up: torch.Tensor) -> torch.Tensor:
    """The plain twin of `silu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
