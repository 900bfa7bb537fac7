"""RMSNorm, fused with the residual addition before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def add_rms_norm(
    x: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    gemma: bool = False,
) -> torch.Tensor:
    """residual += x in place (unless x is None); out = residual / rms(residual) * weight.

    x, residual and out are contiguous [m, hidden_size], weight is [hidden_size] of any floating type.
    Gemma's checkpoints store what the weight is off from one, so there out is scaled by 1 + weight. All
    arithmetic is float32, rounded once. Returns out.
    """
    m, hidden_size = residual.shape
    block = triton.next_power_of_2(hidden_size)
    _add_rms_norm_kernel[(m,)](
        residual if x is None else x,
        residual,
        weight,
        out,
        eps,
        HIDDEN_SIZE=hidden_size,
        BLOCK=block,
        HAS_X=x is not None,
        GEMMA=gemma,
        num_warps=min(16, max(4, block // 512)),
    )
    return out


@triton.jit
def _add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    eps,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_X: tl.constexpr,
    GEMMA: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * HIDDEN_SIZE
    column = tl.arange(0, BLOCK)
    mask = column < HIDDEN_SIZE
    residual = tl.load(residual_ptr + start + column, mask, other=0.0)
    weight = tl.load(weight_ptr + column, mask, other=0.0).to(tl.float32)
    if HAS_X:
        x = tl.load(x_ptr + start + column, mask, other=0.0)
        residual = (residual.to(tl.float32) + x.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptr + start + column, residual, mask)
    wide = residual.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / HIDDEN_SIZE + eps)
    if GEMMA:
        weight += 1.0
    tl.store(out_ptr + start + column, wide * scale * weight, mask)


def add_rms_norm_torch(
    x: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    gemma: bool = False,
) -> torch.Tensor:
    """The plain twin of `add_rms_norm`."""
    if x is not None:
        residual += x
    wide = residual.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    out.copy_(wide * scale * (weight.float() + 1.0 if gemma else weight.float()))
    return out
