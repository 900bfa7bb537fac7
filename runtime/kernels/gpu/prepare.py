"""The state of running requests on the device: what a step reads from it, and how a step moves it on.

Every running request owns one slot, a row of

    last_token    [num_slots] int32, its newest token, whose key and value are not yet in the cache
    seq_len       [num_slots] int32, how many of its tokens have theirs in the cache
    block_tables  [num_slots, max_blocks] int32, the blocks of the cache that hold them

A batch names slots in `rows` [B] int32; -1 stands for padding.
"""

from __future__ import annotations

import torch

from runtime.kernels.gpu.language import tl, triton
from runtime.kernels.gpu.launch import cdiv, kernel

_BLOCK = 128


def prepare_decode(
    rows: torch.Tensor,
    last_token: torch.Tensor,
    seq_len: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    """Write the inputs of a step that computes one token of each request in `rows`.

    token_ids, positions, slots and seq_lens are [B] int32: the newest token, its position, where its key
    and value go (block * block_size + offset), and the request's length with it. Padding gets token 0 at
    position 0, slot -1 and length 0.
    """
    batch = rows.shape[0]
    _prepare_decode_kernel[(cdiv(batch, _BLOCK),)](
        rows,
        last_token,
        seq_len,
        block_tables,
        block_tables.stride(0),
        token_ids,
        positions,
        slots,
        seq_lens,
        batch,
        BLOCK_SIZE=block_size,
        BLOCK=_BLOCK,
        num_warps=4,
    )


@kernel
@triton.jit(
    do_not_specialize=["batch", "table_stride"],
    do_not_specialize_on_alignment=[
        "rows_ptr",
        "token_ids_ptr",
        "positions_ptr",
        "slots_ptr",
        "seq_lens_ptr",
    ],
)
def _prepare_decode_kernel(
    rows_ptr,
    last_token_ptr,
    seq_len_ptr,
    block_tables_ptr,
    table_stride,
    token_ids_ptr,
    positions_ptr,
    slots_ptr,
    seq_lens_ptr,
    batch,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < batch
    row = tl.load(rows_ptr + index, inside, other=-1).to(tl.int64)
    live = inside & (row >= 0)
    position = tl.load(seq_len_ptr + row, live, other=0)
    block = tl.load(block_tables_ptr + row * table_stride + position // BLOCK_SIZE, live, other=0)
    slot = tl.where(live, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    tl.store(token_ids_ptr + index, tl.load(last_token_ptr + row, live, other=0), inside)
    tl.store(positions_ptr + index, position, inside)
    tl.store(slots_ptr + index, slot, inside)
    tl.store(seq_lens_ptr + index, tl.where(live, position + 1, 0), inside)


def prepare_decode_torch(
    rows: torch.Tensor,
    last_token: torch.Tensor,
    seq_len: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    """The plain twin of `prepare_decode`."""
    live, row = rows >= 0, rows.clamp(min=0).long()
    position = torch.where(live, seq_len[row], 0)
    block = block_tables[row, position.long() // block_size]
    token_ids.copy_(torch.where(live, last_token[row], 0))
    positions.copy_(position)
    slots.copy_(torch.where(live, block * block_size + position % block_size, -1))
    seq_lens.copy_(torch.where(live, position + 1, 0))


def apply_updates(updates: torch.Tensor, count: torch.Tensor, block_tables: torch.Tensor) -> None:
    """Enter newly given blocks into the block tables.

    updates [N, 3] int32 holds (slot, index in the table, block) in its first `count` rows; count is [1]
    int32 on the device, so that a captured launch serves any number up to N.
    """
    capacity = updates.shape[0]
    _apply_updates_kernel[(cdiv(capacity, _BLOCK),)](
        updates, count, block_tables, block_tables.stride(0), capacity, BLOCK=_BLOCK, num_warps=4
    )


@kernel
@triton.jit(
    do_not_specialize=["capacity", "table_stride"],
    do_not_specialize_on_alignment=["updates_ptr", "count_ptr"],
)
def _apply_updates_kernel(
    updates_ptr, count_ptr, block_tables_ptr, table_stride, capacity, BLOCK: tl.constexpr
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = index < tl.minimum(tl.load(count_ptr), capacity)
    row = tl.load(updates_ptr + index * 3, live, other=0).to(tl.int64)
    column = tl.load(updates_ptr + index * 3 + 1, live, other=0)
    block = tl.load(updates_ptr + index * 3 + 2, live, other=0)
    tl.store(block_tables_ptr + row * table_stride + column, block, live)


def apply_updates_torch(updates: torch.Tensor, count: torch.Tensor, block_tables: torch.Tensor) -> None:
    """The plain twin of `apply_updates`."""
    row, column, block = updates[: int(count)].unbind(1)
    block_tables[row.long(), column.long()] = block


@triton.jit
def advance(row, token, length, last_token_ptr, seq_len_ptr):
    """For the last kernel of a step: a request's new token, and how many of its tokens are in the cache."""
    tl.store(last_token_ptr + row, token)
    tl.store(seq_len_ptr + row, length)
