"""RMSNorm: of the residual stream, fused with the addition before it; and of queries and keys, by heads."""

from __future__ import annotations

import torch

from runtime.kernels.gpu.early import begin, early_launch
from runtime.kernels.gpu.language import tl, triton
from runtime.kernels.gpu.launch import cdiv, kernel, next_power_of_2

# How many elements of a token one program norms at once, of queries and keys: a power of two.
_TILE = 2048


def add_rms_norm(
    x: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    gemma: bool = False,
    x_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual += x in place (unless x is None); out = residual / rms(residual) * weight.

    With `x_weight` [hidden_size] float32, it is x / rms(x) * x_weight that is added, rounded before that.

    x, residual and out are contiguous [m, hidden_size], weight is [hidden_size] of any floating type.
    Gemma's checkpoints store what the weight is off from one, so there out is scaled by 1 + weight. All
    arithmetic is float32, rounded once. Returns out.
    """
    m, hidden_size = residual.shape
    block = next_power_of_2(hidden_size)
    _add_rms_norm_kernel[(m,)](
        residual if x is None else x,
        residual,
        weight,
        weight if x_weight is None else x_weight,
        out,
        eps,
        HIDDEN_SIZE=hidden_size,
        BLOCK=block,
        HAS_X=x is not None,
        NORMS_X=x_weight is not None,
        GEMMA=gemma,
        num_warps=min(16, max(4, block // 512)),
        **early_launch(),
    )
    return out


@kernel
@triton.jit
def _add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    x_weight_ptr,
    out_ptr,
    eps,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_X: tl.constexpr,
    NORMS_X: tl.constexpr,
    GEMMA: tl.constexpr,
    EARLY: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * HIDDEN_SIZE
    column = tl.arange(0, BLOCK)
    mask = column < HIDDEN_SIZE
    weight = tl.load(weight_ptr + column, mask, other=0.0).to(tl.float32)
    x_weight = weight
    if NORMS_X:
        x_weight = tl.load(x_weight_ptr + column, mask, other=0.0)
    begin(EARLY)
    residual = tl.load(residual_ptr + start + column, mask, other=0.0)
    if HAS_X:
        x = tl.load(x_ptr + start + column, mask, other=0.0)
        if NORMS_X:
            wide_x = x.to(tl.float32)
            x_scale = 1.0 / tl.sqrt(tl.sum(wide_x * wide_x, 0) / HIDDEN_SIZE + eps)
            x = (wide_x * x_scale * x_weight).to(x.dtype)
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
    x_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The plain twin of `add_rms_norm`."""
    if x is not None:
        residual += x if x_weight is None else add_rms_norm_torch(None, x, x_weight, eps, torch.empty_like(x))
    wide = residual.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    out.copy_(wide * scale * (weight.float() + 1.0 if gemma else weight.float()))
    return out


def head_rms_norm(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float, num_heads: int
) -> None:
    """Norm each head's query and key in qkv in place, in float32, rounded once.

    Its plain twin is `head_rms_norm_torch` in `kernels/norm.py`, which the CPU uses as well. qkv is
    [T, (num_heads + 2 num_kv_heads) * head_dim], contiguous: all queries, all keys, all values. The weights
    are [head_dim] of any floating type.
    """
    head_dim = q_weight.shape[0]
    row = qkv.shape[1]
    num_normed = (row // head_dim + num_heads) // 2
    padded_dim = next_power_of_2(head_dim)
    heads_per_program = max(1, _TILE // padded_dim)
    _head_rms_norm_kernel[(qkv.shape[0], cdiv(num_normed, heads_per_program))](
        qkv,
        q_weight,
        k_weight,
        eps,
        ROW=row,
        NUM_HEADS=num_heads,
        NUM_NORMED=num_normed,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        HEADS=heads_per_program,
        num_warps=4,
        **early_launch(),
    )


@kernel
@triton.jit
def _head_rms_norm_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    eps,
    ROW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_NORMED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    EARLY: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    dim = tl.arange(0, PADDED_DIM)[None, :]
    mask = (head < NUM_NORMED) & (dim < HEAD_DIM)
    cell = qkv_ptr + token * ROW + head * HEAD_DIM + dim
    q_weight = tl.load(q_weight_ptr + dim, dim < HEAD_DIM, other=0.0).to(tl.float32)
    k_weight = tl.load(k_weight_ptr + dim, dim < HEAD_DIM, other=0.0).to(tl.float32)
    begin(EARLY)
    x = tl.load(cell, mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)
    tl.store(cell, x * scale[:, None] * tl.where(head < NUM_HEADS, q_weight, k_weight), mask)
