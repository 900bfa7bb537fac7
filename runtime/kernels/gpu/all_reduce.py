"""Sums and rows of all GPUs of a group, by writing into each other's memory; sums fused with what follows.

Every rank has an inbox that the others write to over NVLink. What is written there is its own signal: an
inbox is filled with a mark, negative zero, which is never sent, and whoever waits for a row reads it until no
mark is left in it. So there are no flags, no fences, and one way over the link. (The idea is that of the
"Lamport" all-reduces in NVIDIA's TensorRT-LLM.)

A row of an inbox has three slots, which take turns. With its turn t a row is written to slot t, and slot
t - 1 is filled with marks again; it will be written to at turn t + 2. By then everyone has had this rank's
row of turn t + 1, which it sends in a kernel after the one that filled the slot. The turns are counted on
the device, for each row, so that nothing of this depends on the host, or on a CUDA graph.

Programs wait for programs of the same row on other GPUs. All begin with the first rows, so the first row that
is not through is under way everywhere.

The kernel that follows a sum may start early (see `early.py`); the sum itself does not. Were it to, it would
have to wait for what was launched before it ahead of its first access to any inbox: only then has the sum
before this one filled its old slot with marks. A product that sends its rows does wait before it sends.
"""

from __future__ import annotations

from typing import Any

import torch

from runtime.kernels.gpu.early import can_start_early, let_next_start
from runtime.kernels.gpu.inboxes import GATHER_BLOCK, SLOTS, Inboxes
from runtime.kernels.gpu.language import tl, triton
from runtime.kernels.gpu.launch import cdiv, kernel, next_power_of_2
from runtime.kernels.gpu.prefetch import CHUNK_BYTES, prefetch, prefetch_programs

Norm = tuple[torch.Tensor, torch.Tensor, float]
_SLOTS = tl.constexpr(SLOTS)


def one_shot(
    x: torch.Tensor | None,
    inboxes: Inboxes,
    out: torch.Tensor,
    norm: Norm | None = None,
    upcoming: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum of all ranks' x to out or, with `norm`, what follows from it: every rank reads all of it.

    x, out    [m, hidden_size], m <= max_rows; None for an x that `gemv` has sent
    norm      residual [m, hidden_size], weight [hidden_size], eps: residual += sum;
              out = residual / rms(residual) * weight
    upcoming  weights that the product after this begins to read, if they are to be fetched meanwhile

    Every rank adds in the same order, in float32, so that all get the same bits. Returns out.
    """
    sent = out if x is None else x
    return _add_up(_one_shot_kernel, sent, inboxes, out, norm, upcoming, SENT=x is None)


def two_shot(
    x: torch.Tensor,
    inboxes: Inboxes,
    out: torch.Tensor,
    norm: Norm | None = None,
    upcoming: torch.Tensor | None = None,
) -> torch.Tensor:
    """Like `one_shot`, but row r is added up, and normed, by rank r % world_size alone, for everyone.

    Only that rank's `residual` holds row r afterwards.
    """
    return _add_up(_two_shot_kernel, x, inboxes, out, norm, upcoming)


def _add_up(
    way: Any,
    x: torch.Tensor,
    inboxes: Inboxes,
    out: torch.Tensor,
    norm: Norm | None,
    upcoming: torch.Tensor | None,
    **constants: bool,
) -> torch.Tensor:
    """Launch one of the two kernels, one program a row and some for what is upcoming; returns out."""
    m, hidden_size = x.shape
    block = next_power_of_2(hidden_size)
    residual, weight, eps = norm or (x, x, 0.0)
    num_warps = row_warps(block)
    extra, stride = prefetch_programs(upcoming, num_warps)
    way[(m + extra,)](
        x,
        residual,
        weight,
        out,
        inboxes.addresses,
        inboxes.turns,
        x if upcoming is None else upcoming,
        eps,
        inboxes.rank,
        inboxes.max_rows,
        m,
        stride,
        WORLD_SIZE=inboxes.world_size,
        PADDED_SIZE=next_power_of_2(inboxes.world_size),
        HIDDEN_SIZE=hidden_size,
        BLOCK=block,
        NORM=norm is not None,
        PREFETCH=CHUNK_BYTES if extra else 0,
        EARLY=can_start_early(),
        num_warps=num_warps,
        **constants,
    )
    return out


def gather(x: torch.Tensor, inboxes: Inboxes, out: torch.Tensor) -> torch.Tensor:
    """All ranks' x, side by side.

    x    [m, width] float32, m <= max_rows
    out  [m, world_size * width] float32, which is returned
    """
    m, width = x.shape
    _gather_kernel[(m, cdiv(width, GATHER_BLOCK))](
        x,
        out,
        inboxes.addresses,
        inboxes.turns,
        width,
        inboxes.rank,
        inboxes.max_rows,
        WORLD_SIZE=inboxes.world_size,
        PADDED_SIZE=next_power_of_2(inboxes.world_size),
        BLOCK=GATHER_BLOCK,
        num_warps=4,
    )
    return out


def row_warps(block: int) -> int:
    """So many that each thread has one load of 16 bytes."""
    return min(32, max(4, block // 256))


@triton.jit
def _inbox(addresses_ptr, rank, dtype: tl.constexpr):
    # The compiler makes the widest loads and stores only of what it knows to be aligned.
    return tl.multiple_of(tl.load(addresses_ptr + rank).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _all_inboxes(addresses_ptr, peer, WORLD_SIZE: tl.constexpr, dtype: tl.constexpr):
    """[ranks, 1] pointers, all loaded at once."""
    addresses = tl.load(addresses_ptr + peer, peer < WORLD_SIZE, other=0)
    return tl.multiple_of(addresses.to(tl.pointer_type(dtype)), [16, 16])


@triton.jit
def _sendable(x):
    """x without the mark: negative zeros become positive ones."""
    return tl.where(x == 0.0, 0.0, x).to(x.dtype)


@triton.jit
def send(
    values, row, column, mask, addresses_ptr, turns_ptr, rank, max_rows,
    hidden_size, WORLD_SIZE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Write a part of this rank's rows to all inboxes, where `one_shot` waits for it."""
    turn = tl.load(turns_ptr + row)
    place = (turn * WORLD_SIZE + rank) * max_rows.to(tl.int64) * hidden_size + row * hidden_size + column
    for peer in tl.static_range(WORLD_SIZE):
        tl.store(_inbox(addresses_ptr, peer, dtype) + place, _sendable(values.to(dtype)), mask)


@triton.jit
def _marks(shape: tl.constexpr, dtype: tl.constexpr):
    # A constant of either zero may become the positive one.
    return tl.full(shape, -32768, tl.int16).to(dtype, bitcast=True)


@triton.jit
def _missing(values):
    marks = (values.to(tl.int16, bitcast=True) == -32768).to(tl.int32)
    return tl.max(tl.max(marks, 0), 0)


@triton.jit
def _missing_wide(values):
    marks = (values.to(tl.int32, bitcast=True) == -2147483648).to(tl.int32)
    return tl.max(tl.max(marks, 0), 0)


@triton.jit
def _sum_of_sent(pointers, mask):
    """The sum of what is sent there, [ranks, BLOCK] -> [BLOCK] float32, once all of it has come."""
    values = tl.load(pointers, mask, other=0.0, volatile=True)
    while _missing(values) != 0:
        values = tl.load(pointers, mask, other=0.0, volatile=True)
    return tl.sum(values.to(tl.float32), 0)


@triton.jit
def normed(total, residual, weight, residual_ptrs, mask, eps, HIDDEN_SIZE: tl.constexpr):
    """residual += total, and the norm of that."""
    residual = (residual.to(tl.float32) + total).to(residual.dtype)
    tl.store(residual_ptrs, residual, mask)
    wide = residual.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / HIDDEN_SIZE + eps)
    return wide * scale * weight.to(tl.float32)


@kernel
@triton.jit(do_not_specialize=["rank", "max_rows", "num_rows", "stride"])
def _one_shot_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    addresses_ptr,
    turns_ptr,
    upcoming_ptr,
    eps,
    rank,
    max_rows,
    num_rows,
    stride,
    WORLD_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    PREFETCH: tl.constexpr,
    SENT: tl.constexpr,
    EARLY: tl.constexpr,
):
    let_next_start(EARLY)
    row = tl.program_id(0)
    if PREFETCH:
        if row >= num_rows:
            prefetch(upcoming_ptr, row - num_rows, stride, PREFETCH)
            return
    column = tl.arange(0, BLOCK)
    mask = column < HIDDEN_SIZE
    here = row.to(tl.int64) * HIDDEN_SIZE + column
    peer = tl.arange(0, PADDED_SIZE)[:, None]
    all_mask = (peer < WORLD_SIZE) & mask[None, :]
    dtype = x_ptr.dtype.element_ty
    # Everything is loaded before anything is waited for.
    turn = tl.load(turns_ptr + row)
    inbox = _inbox(addresses_ptr, rank, dtype)
    residual = tl.load(residual_ptr + here, mask, other=0.0)
    weight = tl.load(weight_ptr + column, mask, other=0.0)
    # A slot holds all rows of each rank.
    part = max_rows.to(tl.int64) * HIDDEN_SIZE
    if not SENT:
        inboxes = _all_inboxes(addresses_ptr, peer, WORLD_SIZE, dtype)
        x = tl.load(x_ptr + here, mask, other=0.0)
        to_send = tl.broadcast_to(_sendable(x)[None, :], (PADDED_SIZE, BLOCK))
        tl.store(inboxes + ((turn * WORLD_SIZE + rank) * part + here)[None, :], to_send, all_mask)
    sent = inbox + peer * part + here[None, :]
    total = _sum_of_sent(sent + turn * WORLD_SIZE * part, all_mask)
    if NORM:
        total = normed(total, residual, weight, residual_ptr + here, mask, eps, HIDDEN_SIZE)
    tl.store(out_ptr + here, total, mask)
    old = (turn + _SLOTS - 1) % _SLOTS
    tl.store(sent + old * WORLD_SIZE * part, _marks((PADDED_SIZE, BLOCK), dtype), all_mask)
    tl.store(turns_ptr + row, (turn + 1) % _SLOTS)


@kernel
@triton.jit(do_not_specialize=["rank", "max_rows", "num_rows", "stride"])
def _two_shot_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    addresses_ptr,
    turns_ptr,
    upcoming_ptr,
    eps,
    rank,
    max_rows,
    num_rows,
    stride,
    WORLD_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    PREFETCH: tl.constexpr,
    EARLY: tl.constexpr,
):
    let_next_start(EARLY)
    row = tl.program_id(0)
    if PREFETCH:
        if row >= num_rows:
            prefetch(upcoming_ptr, row - num_rows, stride, PREFETCH)
            return
    owner = row % WORLD_SIZE
    column = tl.arange(0, BLOCK)
    mask = column < HIDDEN_SIZE
    here = row.to(tl.int64) * HIDDEN_SIZE + column
    dtype = x_ptr.dtype.element_ty
    turn = tl.load(turns_ptr + row)
    old = (turn + _SLOTS - 1) % _SLOTS
    x = tl.load(x_ptr + here, mask, other=0.0)
    # A slot holds each rank's part of the own rows, then the results of all rows.
    part = (max_rows // WORLD_SIZE).to(tl.int64) * HIDDEN_SIZE
    results = WORLD_SIZE * part
    own = (row // WORLD_SIZE).to(tl.int64) * HIDDEN_SIZE + column
    inbox = _inbox(addresses_ptr, rank, dtype)
    if owner == rank:
        peer = tl.arange(0, PADDED_SIZE)[:, None]
        sent = inbox + peer * part + own[None, :]
        others_mask = (peer < WORLD_SIZE) & (peer != rank) & mask[None, :]
        inboxes = _all_inboxes(addresses_ptr, peer, WORLD_SIZE, dtype)
        residual = tl.load(residual_ptr + here, mask, other=0.0)
        weight = tl.load(weight_ptr + column, mask, other=0.0)
        total = x.to(tl.float32) + _sum_of_sent(sent + turn * 2 * results, others_mask)
        if NORM:
            total = normed(total, residual, weight, residual_ptr + here, mask, eps, HIDDEN_SIZE)
        y = _sendable(total.to(dtype))
        to_send = tl.broadcast_to(y[None, :], (PADDED_SIZE, BLOCK))
        tl.store(inboxes + ((turn * 2 + 1) * results + here)[None, :], to_send, others_mask)
        tl.store(out_ptr + here, y, mask)
        tl.store(sent + old * 2 * results, _marks((PADDED_SIZE, BLOCK), dtype), others_mask)
    else:
        target = _inbox(addresses_ptr, owner, dtype) + turn * 2 * results
        tl.store(target + rank * part + own, _sendable(x), mask)
        result = inbox + results + here
        y = _sum_of_sent((result + turn * 2 * results)[None, :], mask[None, :]).to(dtype)
        tl.store(result + old * 2 * results, _marks((BLOCK,), dtype), mask)
        tl.store(out_ptr + here, y, mask)
    tl.store(turns_ptr + row, (turn + 1) % _SLOTS)


@kernel
@triton.jit(do_not_specialize=["rank", "max_rows"])
def _gather_kernel(
    x_ptr,
    out_ptr,
    addresses_ptr,
    turns_ptr,
    width,
    rank,
    max_rows,
    WORLD_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    peer = tl.arange(0, PADDED_SIZE)[:, None]
    all_mask = (peer < WORLD_SIZE) & mask[None, :]
    block = row * tl.num_programs(1) + tl.program_id(1)
    turn = tl.load(turns_ptr + block)
    inboxes = _all_inboxes(addresses_ptr, peer, WORLD_SIZE, tl.float32)
    inbox = _inbox(addresses_ptr, rank, tl.float32)
    x = _sendable(tl.load(x_ptr + row * width + column, mask, other=0.0))
    # A slot holds all rows, of each those of all ranks.
    slot = max_rows.to(tl.int64) * WORLD_SIZE * width
    here = (row * WORLD_SIZE + peer) * width + column[None, :]
    to_send = tl.broadcast_to(x[None, :], (PADDED_SIZE, BLOCK))
    own = (row * WORLD_SIZE + rank) * width + column
    tl.store(inboxes + (turn * slot + own)[None, :], to_send, all_mask)
    sent = inbox + turn * slot + here
    values = tl.load(sent, all_mask, other=0.0, volatile=True)
    while _missing_wide(values) != 0:
        values = tl.load(sent, all_mask, other=0.0, volatile=True)
    tl.store(out_ptr + here, values, all_mask)
    old = (turn + _SLOTS - 1) % _SLOTS
    tl.store(
        inbox + old * slot + here,
        tl.full((PADDED_SIZE, BLOCK), -2147483648, tl.int32).to(tl.float32, bitcast=True),
        all_mask,
    )
    tl.store(turns_ptr + block, (turn + 1) % _SLOTS)


def all_reduce_torch(parts: list[torch.Tensor], norm: Norm | None = None) -> torch.Tensor:
    """The plain twin of `one_shot` and `two_shot`, given all ranks' x."""
    total = torch.stack([part.float() for part in parts]).sum(0)
    if norm is None:
        return total.to(parts[0].dtype)
    residual, weight, eps = norm
    residual.copy_(residual.float() + total)
    wide = residual.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(parts[0].dtype)
