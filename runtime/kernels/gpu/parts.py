"""The rows of a long sum over ranks, once the parts that other ranks copied here have come."""

from __future__ import annotations

import torch

from runtime.kernels.gpu.all_reduce import normed, row_warps
from runtime.kernels.gpu.language import tl, triton
from runtime.kernels.gpu.launch import kernel, next_power_of_2


def wait_for(flags: torch.Tensor, value: int, rank: int) -> None:
    """Let nothing after this run before all other ranks have copied `value` to their place of `flags`.

    flags  [world_size] int32, written by copies between GPUs
    """
    size = flags.shape[0]
    _wait_kernel[(1,)](flags, value, rank, size, PADDED_SIZE=next_power_of_2(size), num_warps=1)


def add_parts(
    x: torch.Tensor,
    parts: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    rank: int,
) -> torch.Tensor:
    """residual += x + the other ranks' parts; out = residual / rms(residual) * weight, which is returned.

    x, residual, out  [m, hidden_size]
    parts             [world_size, max_rows, hidden_size], m <= max_rows, of which [rank] is not read
    weight            [hidden_size] float32
    """
    m, hidden_size = x.shape
    world_size, max_rows, _ = parts.shape
    block = next_power_of_2(hidden_size)
    _add_parts_kernel[(m,)](
        x,
        parts,
        residual,
        weight,
        out,
        eps,
        rank,
        max_rows,
        WORLD_SIZE=world_size,
        PADDED_SIZE=next_power_of_2(world_size),
        HIDDEN_SIZE=hidden_size,
        BLOCK=block,
        num_warps=row_warps(block),
    )
    return out


@kernel
@triton.jit(do_not_specialize=["value", "rank", "size"])
def _wait_kernel(flags_ptr, value, rank, size, PADDED_SIZE: tl.constexpr):
    peer = tl.arange(0, PADDED_SIZE)
    others = (peer < size) & (peer != rank)
    found = tl.load(flags_ptr + peer, others, other=0, volatile=True)
    while tl.max(tl.where(others & (found != value), 1, 0), 0) != 0:
        found = tl.load(flags_ptr + peer, others, other=0, volatile=True)


@kernel
@triton.jit(do_not_specialize=["rank", "max_rows"])
def _add_parts_kernel(
    x_ptr,
    parts_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    eps,
    rank,
    max_rows,
    WORLD_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    mask = column < HIDDEN_SIZE
    here = tl.program_id(0).to(tl.int64) * HIDDEN_SIZE + column
    peer = tl.arange(0, PADDED_SIZE)[:, None]
    others = (peer < WORLD_SIZE) & (peer != rank) & mask[None, :]
    part = peer * max_rows.to(tl.int64) * HIDDEN_SIZE + here[None, :]
    x = tl.load(x_ptr + here, mask, other=0.0).to(tl.float32)
    total = x + tl.sum(tl.load(parts_ptr + part, others, other=0.0).to(tl.float32), 0)
    residual = tl.load(residual_ptr + here, mask, other=0.0)
    weight = tl.load(weight_ptr + column, mask, other=0.0)
    y = normed(total, residual, weight, residual_ptr + here, mask, eps, HIDDEN_SIZE)
    tl.store(out_ptr + here, y, mask)


def add_parts_torch(
    x: torch.Tensor,
    parts: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    rank: int,
) -> torch.Tensor:
    """The plain twin of `add_parts`."""
    others = [part[: len(x)].float() for peer, part in enumerate(parts) if peer != rank]
    residual.copy_(residual.float() + x.float() + torch.stack(others).sum(0))
    wide = residual.float()
    return out.copy_(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight)
