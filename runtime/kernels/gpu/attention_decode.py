"""Attention of one new token a sequence over the paged cache, split over the keys (Flash-Decoding).

A program takes one sequence, one key head with all the query heads that share it, and one run of keys.
The grid depends on no length, so a CUDA graph may hold it. Of the programs of one sequence and head, the
one that ends last merges the others' partial results; nothing is merged where one program did it all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.kernels.gpu.attention_tile import (
    LOG2E,
    LOWEST,
    Workspace,
    attend,
    attend_torch,
    merge_splits,
)
from runtime.kernels.gpu.early import early_launch, let_next_start, wait
from runtime.kernels.gpu.language import tl, triton
from runtime.kernels.gpu.launch import kernel, next_power_of_2

# A program without keys ends at once, but many of them add up.
_MAX_PROGRAMS = 4096
MAX_SPLITS = 16
# How many float32 of partial results a program holds at once while it merges: 32 registers a thread.
_MERGE_ELEMENTS_PER_WARP = 1024
# Of so few rows the product that comes next is a kernel of our own (`gemv.py`). Were it to read its weights
# while keys are read, those would come later.
_MAX_HELD_BACK = 8


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the kernel is built: keys a tile, warps a program, tiles in flight."""

    block_n: int
    num_warps: int
    num_stages: int


def decode_config(head_dim: int, element_size: int) -> DecodeConfig:
    """Measured on an H200: 88 % of its memory's speed at batch 256. Wider heads hold as many bytes a tile."""
    if element_size == 4:
        return DecodeConfig(32 if head_dim <= 128 else 16, 4, 2)
    return DecodeConfig(64 if head_dim <= 128 else 32, 4, 3)


def min_split_keys(batch: int, num_kv_heads: int) -> int:
    """The fewest keys that a program takes, unless its sequence has fewer: splits of fewer cost more to
    merge than they save, the more so the more programs there are anyway. From times on an H100, of equal,
    ragged and skewed lengths."""
    programs = batch * num_kv_heads
    return max(256, min(16 * programs, 1024), min(2 * programs, 2048))


def splits_for(batch: int, num_kv_heads: int, max_len: int) -> int:
    """How many splits to capture a graph with; short sequences leave most of theirs unused.

    `max_len` is the longest that a sequence may become while the graph is in use.
    """
    useful = max_len // min_split_keys(batch, num_kv_heads)
    return max(1, min(useful, _MAX_PROGRAMS // (batch * num_kv_heads), MAX_SPLITS))


def decode_workspace(
    batch: int, num_heads: int, num_kv_heads: int, head_dim: int, num_splits: int, device: torch.device | str
) -> Workspace:
    """The room that `paged_decode` needs; one that is large enough for several shapes serves them all."""
    return Workspace.allocate(batch * num_heads * num_splits, head_dim, batch * num_kv_heads, device)


@kernel
@triton.jit(
    do_not_specialize=["table_stride", "min_keys"],
    do_not_specialize_on_alignment=[
        *("block_tables", "table_rows", "seq_lens", "alibi_slopes", "query_scale")
    ],
)
def _decode_kernel(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    block_tables: tl.tensor,
    table_rows: tl.tensor,
    seq_lens: tl.tensor,
    out: tl.tensor,
    alibi_slopes: tl.tensor | None,
    query_scale: tl.tensor | None,
    partials: tl.tensor,
    logs: tl.tensor,
    counters: tl.tensor,
    q_stride: tl.tensor,
    out_stride: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    min_keys: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    MERGE_CHUNK: tl.constexpr,
    HOLDS_BACK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    if not HOLDS_BACK:
        let_next_start(EARLY)
    wait(EARLY)
    head = tl.program_id(0)
    row = tl.program_id(1)
    split = tl.program_id(2)
    num_splits = tl.num_programs(2)
    seq_len = tl.load(seq_lens + row)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(seq_len - WINDOW, 0) // BLOCK_N * BLOCK_N
    tiles = tl.cdiv(seq_len - first, BLOCK_N)
    tiles_per_split = tl.maximum(tl.cdiv(tiles, num_splits), tl.cdiv(min_keys, BLOCK_N))
    # A padding row has no tiles: its one program writes the zeros that acc begins with.
    active = tl.maximum(tl.cdiv(tiles, tiles_per_split), 1)
    if split >= active:
        return
    table = block_tables + tl.load(table_rows + row).to(tl.int64) * table_stride
    lo = first + split * tiles_per_split * BLOCK_N
    hi = tl.minimum(lo + tiles_per_split * BLOCK_N, seq_len)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, PADDED_DIM)
    cells = (head * GROUP + rows)[:, None] * HEAD_DIM + dims[None, :]
    mask = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    query = tl.load(q + row.to(tl.int64) * q_stride + cells, mask=mask, other=0.0)
    factor = scale * LOG2E
    if query_scale is not None:
        factor *= tl.load(query_scale + row)
    slopes = None
    if alibi_slopes is not None:
        slopes = tl.load(alibi_slopes + head * GROUP + rows, mask=rows < GROUP, other=0.0)
    head_start = head * BLOCK_SIZE * HEAD_DIM
    acc, row_max, row_sum = attend(
        tl.zeros([ROWS, PADDED_DIM], tl.float32),
        tl.full([ROWS], LOWEST, tl.float32),
        tl.zeros([ROWS], tl.float32),
        query, keys + head_start, values + head_start, table, lo, hi, seq_len,
        tl.zeros([ROWS], tl.int32) + (seq_len - 1),
        tl.zeros([ROWS], tl.float32) + factor,
        slopes, block_stride,
        BLOCK_SIZE, HEAD_DIM, BLOCK_N, SOFTCAP, WINDOW, True,
    )  # fmt: skip
    let_next_start(EARLY)
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]

    out += row.to(tl.int64) * out_stride
    if active == 1:
        tl.store(out + cells, acc.to(out.dtype.element_ty), mask=mask)
    else:
        tile = row * tl.num_programs(0) + head
        logs += tile * num_splits * GROUP
        partials += tile.to(tl.int64) * num_splits * GROUP * HEAD_DIM
        part = (split * GROUP + rows)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(partials + part, acc, mask=mask)
        tl.store(logs + split * GROUP + rows, row_max + tl.log2(row_sum), mask=rows < GROUP)
        # All threads have written before one of them says so.
        tl.debug_barrier()
        done = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if done == active - 1:
            tl.store(counters + tile, 0)
            merged = merge_splits(
                partials, logs, active, GROUP, HEAD_DIM, MERGE_ROWS, PADDED_DIM, MERGE_CHUNK
            )
            merged_rows = tl.arange(0, MERGE_ROWS)
            merged_cells = (head * GROUP + merged_rows)[:, None] * HEAD_DIM + dims[None, :]
            merged_mask = (merged_rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
            tl.store(out + merged_cells, merged.to(out.dtype.element_ty), mask=merged_mask)


def paged_decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    table_rows: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    num_splits: int,
    workspace: Workspace,
    softcap: float = 0.0,
    window: int = 0,
    alibi_slopes: torch.Tensor | None = None,
    query_scale: torch.Tensor | None = None,
    config: DecodeConfig | None = None,
) -> torch.Tensor:
    """Attention of the newest token of each of B sequences; returns `out`.

    q             [B, num_heads, head_dim], rows at any stride
    keys, values  [num_blocks, num_kv_heads, block_size, head_dim], blocks at any stride
    block_tables  [num_slots, max_blocks] int32, of which row b uses line table_rows[b] ([B] int32)
    seq_lens      [B] int32, the newest token included; 0 marks a padding row, which becomes zeros
    out           [B, num_heads, head_dim], rows at any stride
    window        how many tokens back a token sees, itself included; 0 for all
    softcap       c in c * tanh(score / c); 0 for none
    alibi_slopes  [num_heads] float32: slope * (key position - query position) is added to the scores
    query_scale   [B] float32, further factors of the queries
    Raises ValueError if the workspace is too small.
    """
    batch, num_heads, head_dim = q.shape
    num_kv_heads, block_size = keys.shape[1:3]
    group = num_heads // num_kv_heads
    workspace.require(batch * num_heads * num_splits, head_dim, batch * num_kv_heads)
    config = config or decode_config(head_dim, keys.element_size())
    padded_dim = next_power_of_2(head_dim)
    merge_rows = next_power_of_2(group)
    room = config.num_warps * _MERGE_ELEMENTS_PER_WARP
    _decode_kernel[(num_kv_heads, batch, num_splits)](
        q, keys, values, block_tables, table_rows, seq_lens, out, alibi_slopes, query_scale,
        workspace.partials, workspace.logs, workspace.counters,
        q.stride(0), out.stride(0), block_tables.stride(0), keys.stride(0),
        min_split_keys(batch, num_kv_heads), scale,
        GROUP=group,
        ROWS=max(16, merge_rows),
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        BLOCK_SIZE=block_size,
        BLOCK_N=config.block_n,
        SOFTCAP=softcap,
        WINDOW=window,
        MERGE_ROWS=merge_rows,
        MERGE_CHUNK=max(1, min(16, room // (merge_rows * padded_dim))),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        HOLDS_BACK=batch <= _MAX_HELD_BACK,
        **early_launch(),
    )  # fmt: skip
    return out


def paged_decode_torch(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    table_rows: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    alibi_slopes: torch.Tensor | None = None,
    query_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The plain twin of `paged_decode`: one sequence after another, dense and in float32."""
    for row, (slot, seq_len) in enumerate(zip(table_rows.tolist(), seq_lens.tolist(), strict=True)):
        if seq_len == 0:
            out[row] = 0
            continue
        out[row] = attend_torch(
            q[row : row + 1], keys, values, block_tables[slot], seq_len,
            scale=scale, softcap=softcap, window=window, alibi_slopes=alibi_slopes,
            query_scale=None if query_scale is None else query_scale[row : row + 1],
        )[0]  # fmt: skip
    return out
