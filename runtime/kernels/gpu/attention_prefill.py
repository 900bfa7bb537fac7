"""Attention of many new tokens a sequence over the paged cache: first chunks, later chunks, extensions.

A program takes a tile of new tokens of one sequence with all the query heads that share a key head, so
its rows are (token, head) pairs: the tensor cores' tiles fill up whatever the group size, and a tile
spans few tokens, so little of it lies beyond the causal diagonal. Where there are too few tiles to fill
the device, the keys of each are split as in `attention_decode.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from runtime.kernels.gpu.attention_tile import (
    LOG2E,
    LOWEST,
    Workspace,
    attend,
    attend_torch,
    merge_splits,
)
from runtime.kernels.gpu.language import tl, triton
from runtime.kernels.gpu.launch import kernel, next_power_of_2

# A split of fewer keys than this costs more to merge than it saves.
MIN_SPLIT_KEYS = 512
_MERGE_ELEMENTS_PER_WARP = 2048


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How the kernel is built: rows and keys a tile, warps a program, tiles of keys in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def prefill_config(head_dim: int, element_size: int) -> PrefillConfig:
    """Measured on an H100: 55 % of a matrix product's speed for one prompt of 8,000 tokens."""
    if element_size == 4:
        return PrefillConfig(32, 16, 8, 2)
    return PrefillConfig(128, 64, 8, 2 if head_dim > 128 else 3)


def prefill_tile(num_heads: int, num_kv_heads: int, head_dim: int, element_size: int) -> int:
    """How many new tokens of a sequence one work item takes."""
    return prefill_config(head_dim, element_size).block_m // (num_heads // num_kv_heads)


def prefill_work_items(counts: Sequence[int], seq_lens: Sequence[int], tile: int) -> npt.NDArray[np.int32]:
    """[N, 2] int32: (sequence, the first of its new tokens in the tile), those with most keys first, so
    that no long tile starts when the others end.

    `counts` [S] are the new tokens of each sequence, `seq_lens` [S] all its tokens, the new ones included.
    """
    new = np.asarray(counts, np.int64)
    tiles = -(-new // tile)
    sequence = np.repeat(np.arange(len(new)), tiles)
    first = (np.arange(len(sequence)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * tile
    history = (np.asarray(seq_lens, np.int64) - new)[sequence]
    heaviest_first = np.argsort(-(history + np.minimum(first + tile, new[sequence])), kind="stable")
    return np.stack([sequence, first], 1).astype(np.int32)[heaviest_first]


def prefill_splits(num_items: int, num_kv_heads: int, max_len: int, num_sms: int) -> int:
    """How many splits to launch with: more than one only where the tiles leave half the device idle."""
    programs = num_items * num_kv_heads
    return max(1, min(num_sms // programs, max_len // MIN_SPLIT_KEYS)) if programs else 1


def prefill_workspace(
    num_kv_heads: int, head_dim: int, element_size: int, num_sms: int, device: torch.device | str
) -> Workspace:
    """The room for any launch with as many splits as `prefill_splits` says."""
    programs = max(num_sms, num_kv_heads)
    return Workspace.allocate(
        programs * prefill_config(head_dim, element_size).block_m, head_dim, programs, device
    )


@kernel
@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=[
        *("block_tables", "table_rows", "query_start", "seq_lens", "work_items"),
        *("alibi_slopes", "query_scale"),
    ],
)
def _prefill_kernel(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    block_tables: tl.tensor,
    table_rows: tl.tensor | None,
    query_start: tl.tensor,
    seq_lens: tl.tensor,
    work_items: tl.tensor,
    out: tl.tensor,
    alibi_slopes: tl.tensor | None,
    query_scale: tl.tensor | None,
    partials: tl.tensor | None,
    logs: tl.tensor | None,
    counters: tl.tensor | None,
    q_stride: tl.tensor,
    out_stride: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    scale: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    MERGE_CHUNK: tl.constexpr,
) -> None:
    TILE: tl.constexpr = BLOCK_M // GROUP
    item = tl.program_id(0) // NUM_KV_HEADS
    head = tl.program_id(0) % NUM_KV_HEADS
    sequence = tl.load(work_items + 2 * item)
    first = tl.load(work_items + 2 * item + 1)
    begin = tl.load(query_start + sequence)
    count = tl.load(query_start + sequence + 1) - begin
    seq_len = tl.load(seq_lens + sequence)
    slot = sequence
    if table_rows is not None:
        slot = tl.load(table_rows + sequence)
    table = block_tables + slot.to(tl.int64) * table_stride

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, PADDED_DIM)
    tokens = first + rows // GROUP
    there = (rows < TILE * GROUP) & (tokens < count)
    heads = head * GROUP + rows % GROUP
    mask = there[:, None] & (dims < HEAD_DIM)[None, :]
    cells = (heads * HEAD_DIM)[:, None] + dims[None, :]
    token_rows = (begin + tokens).to(tl.int64)
    query = tl.load(q + (token_rows * q_stride)[:, None] + cells, mask=mask, other=0.0)
    factor = tl.zeros([BLOCK_M], tl.float32) + scale * LOG2E
    if query_scale is not None:
        factor *= tl.load(query_scale + token_rows, mask=there, other=1.0)
    slopes = None
    if alibi_slopes is not None:
        slopes = tl.load(alibi_slopes + heads, mask=there, other=0.0)

    # Keys before `everyone` are seen by all rows, as far as the causal mask goes; `end` keys by the last.
    oldest = seq_len - count + first
    newest = seq_len - count + tl.minimum(first + TILE, count) - 1
    positions = tl.minimum(seq_len - count + tokens, newest)
    end = newest + 1
    everyone = (oldest + 1) // BLOCK_N * BLOCK_N
    start = 0
    edge = 0
    if WINDOW > 0:
        start = tl.maximum(oldest - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        edge = tl.minimum(tl.cdiv(tl.maximum(newest - WINDOW + 1, 0), BLOCK_N) * BLOCK_N, everyone)
    lo = start
    hi = end
    if partials is not None:
        tiles = tl.cdiv(end - start, BLOCK_N)
        tiles_per_split = tl.cdiv(tiles, tl.num_programs(1))
        active = tl.cdiv(tiles, tiles_per_split)
        if tl.program_id(1) >= active:
            return
        lo = start + tl.program_id(1) * tiles_per_split * BLOCK_N
        hi = tl.minimum(lo + tiles_per_split * BLOCK_N, end)

    head_start = head * BLOCK_SIZE * HEAD_DIM
    keys += head_start
    values += head_start
    acc = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if WINDOW > 0:
        acc, row_max, row_sum = attend(
            acc, row_max, row_sum, query, keys, values, table, lo, tl.minimum(edge, hi), end,
            positions, factor, slopes, block_stride,
            BLOCK_SIZE, HEAD_DIM, BLOCK_N, SOFTCAP, WINDOW, True,
        )  # fmt: skip
    acc, row_max, row_sum = attend(
        acc, row_max, row_sum, query, keys, values, table,
        tl.maximum(edge, lo), tl.minimum(everyone, hi), end,
        positions, factor, slopes, block_stride,
        BLOCK_SIZE, HEAD_DIM, BLOCK_N, SOFTCAP, WINDOW, False,
    )  # fmt: skip
    acc, row_max, row_sum = attend(
        acc, row_max, row_sum, query, keys, values, table, tl.maximum(everyone, lo), hi, end,
        positions, factor, slopes, block_stride,
        BLOCK_SIZE, HEAD_DIM, BLOCK_N, SOFTCAP, WINDOW, True,
    )  # fmt: skip
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]

    out_cells = (token_rows * out_stride)[:, None] + cells
    if partials is None:
        tl.store(out + out_cells, acc.to(out.dtype.element_ty), mask=mask)
    else:
        tile = tl.program_id(0)
        part = (tile * tl.num_programs(1)).to(tl.int64) * BLOCK_M
        partials += part * HEAD_DIM
        logs += part
        part_rows = tl.program_id(1) * BLOCK_M + rows
        tl.store(partials + part_rows[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
        tl.store(logs + part_rows, row_max + tl.log2(row_sum), mask=there)
        # All threads have written before one of them says so.
        tl.debug_barrier()
        done = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if done == active - 1:
            tl.store(counters + tile, 0)
            merged = merge_splits(partials, logs, active, BLOCK_M, HEAD_DIM, BLOCK_M, PADDED_DIM, MERGE_CHUNK)
            tl.store(out + out_cells, merged.to(out.dtype.element_ty), mask=mask)


def paged_prefill(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    work_items: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    alibi_slopes: torch.Tensor | None = None,
    query_scale: torch.Tensor | None = None,
    table_rows: torch.Tensor | None = None,
    num_splits: int = 1,
    workspace: Workspace | None = None,
    config: PrefillConfig | None = None,
) -> torch.Tensor:
    """Causal attention of T new tokens of S sequences, keys and values already cached; returns `out`.

    q             [T, num_heads, head_dim], rows at any stride
    keys, values  [num_blocks, num_kv_heads, block_size, head_dim], blocks at any stride
    block_tables  [lines, max_blocks] int32; sequence s uses line s, or table_rows[s] ([S] int32) if given
    query_start   [S + 1] int32, where each sequence's new tokens begin in q
    seq_lens      [S] int32, all tokens of each sequence, the new ones included
    work_items    [N, 2] int32 from `prefill_work_items`, for tiles of `prefill_tile` tokens
    out           [T, num_heads, head_dim], rows at any stride
    num_splits    from `prefill_splits`; more than one needs a workspace
    `softcap`, `window`, `alibi_slopes` and `query_scale` [T]: as in `paged_decode`.
    Raises ValueError if the workspace is too small.
    """
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, block_size = keys.shape[1:3]
    config = config or prefill_config(head_dim, keys.element_size())
    programs = work_items.shape[0] * num_kv_heads
    if num_splits == 1:
        workspace = None
    elif workspace is None:
        raise ValueError(f"{num_splits} splits need a workspace")
    else:
        workspace.require(programs * num_splits * config.block_m, head_dim, programs)
    padded_dim = next_power_of_2(head_dim)
    room = config.num_warps * _MERGE_ELEMENTS_PER_WARP
    _prefill_kernel[(programs, num_splits)](
        q, keys, values, block_tables, table_rows, query_start, seq_lens, work_items, out,
        alibi_slopes, query_scale,
        None if workspace is None else workspace.partials,
        None if workspace is None else workspace.logs,
        None if workspace is None else workspace.counters,
        q.stride(0), out.stride(0), block_tables.stride(0), keys.stride(0), scale,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SOFTCAP=softcap,
        WINDOW=window,
        MERGE_CHUNK=max(1, room // (config.block_m * padded_dim)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return out


def paged_prefill_torch(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    alibi_slopes: torch.Tensor | None = None,
    query_scale: torch.Tensor | None = None,
    table_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The plain twin of `paged_prefill`: one sequence after another, dense and in float32."""
    starts = query_start.tolist()
    slots = range(len(starts) - 1) if table_rows is None else table_rows.tolist()
    for sequence, (slot, seq_len) in enumerate(zip(slots, seq_lens.tolist(), strict=True)):
        new = slice(starts[sequence], starts[sequence + 1])
        out[new] = attend_torch(
            q[new], keys, values, block_tables[slot], seq_len,
            scale=scale, softcap=softcap, window=window, alibi_slopes=alibi_slopes,
            query_scale=None if query_scale is None else query_scale[new],
        )  # fmt: skip
    return out
