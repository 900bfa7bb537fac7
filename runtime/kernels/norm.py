"""RMSNorm, fused with the residual addition before it."""

from __future__ import annotations

import torch

from runtime.kernels import native


def add_rms_norm(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """residual += x in place (unless x is None); returns residual / rms(residual) * weight.

    x and residual are [m, hidden_size], weight is [hidden_size] in float32.
    """
    if residual.device.type == "cuda":
        from runtime.kernels.gpu import norm

        return norm.add_rms_norm(x, residual, weight, eps, torch.empty_like(residual))
    lib = native.library() if residual.device.type == "cpu" else None
    if lib is None:
        return add_rms_norm_torch(x, residual, weight, eps)
    out = torch.empty_like(residual)
    m, n = residual.shape
    lib.add_rms_norm(
        None if x is None else x.data_ptr(), residual.data_ptr(), weight.data_ptr(), eps, m, n, out.data_ptr()
    )
    return out


def add_rms_norm_torch(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """The plain twin of `add_rms_norm`: statistics in float32, as the Llama family computes them."""
    if x is not None:
        residual += x
    wide = residual.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed.to(residual.dtype) * weight.to(residual.dtype)).contiguous()
