"""What the attention kernels share: one tile of cached keys and values, and the merging of splits.

The softmax is computed online (Milakov and Gimelshein, 2018; Dao, FlashAttention, 2022) with powers of
two: `factor` carries log2(e), so that exp(x) is one exp2. A tile's partial result is (acc, row_max,
row_sum): the weighted values not yet divided, the largest score in units of log2, the sum of weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.kernels.gpu.language import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
# Below every score, yet finite: a row that has seen no key so far must not compute inf - inf.
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def tile_blocks(
    table: tl.tensor, start: tl.tensor, end: tl.tensor, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr
) -> tl.tensor:
    """The cache blocks of keys start .. start + BLOCK_N: one for all of them, or one for each.

    Of keys from `end` on, whose table entries may never have been written, it is block 0.
    """
    if BLOCK_SIZE % BLOCK_N == 0:
        return tl.load(table + start // BLOCK_SIZE, mask=start < end, other=0)
    else:
        columns = start + tl.arange(0, BLOCK_N)
        return tl.load(table + columns // BLOCK_SIZE, mask=columns < end, other=0)


@triton.jit
def scores_of(
    q: tl.tensor,
    k: tl.tensor,
    columns: tl.tensor,
    positions: tl.tensor,
    factor: tl.tensor,
    slopes: tl.tensor | None,
    SOFTCAP: tl.constexpr,
) -> tl.tensor:
    """[rows, BLOCK_N] scores: in units of log2 with a soft cap or ALiBi, else still to be times `factor`."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SOFTCAP > 0:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), exact at both ends of exp2's range.
        grown = tl.exp2(scores * (factor * (2.0 / SOFTCAP))[:, None])
        scores = (SOFTCAP * LOG2E) - (2.0 * SOFTCAP * LOG2E) / (grown + 1.0)
    elif slopes is not None:
        scores *= factor[:, None]
    if slopes is not None:
        distance = (columns[None, :] - positions[:, None]).to(tl.float32)
        scores += (slopes * LOG2E)[:, None] * distance
    return scores


@triton.jit
def attend(
    acc: tl.tensor,
    row_max: tl.tensor,
    row_sum: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    end: tl.tensor,
    positions: tl.tensor,
    factor: tl.tensor,
    slopes: tl.tensor | None,
    block_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Attend to the tiles of keys from `lo` (a multiple of BLOCK_N) to `hi`, of a sequence with `end` keys.

    `keys` and `values` point at one key head in block 0. Without MASKED, every row sees every key.
    """
    dims = tl.arange(0, acc.shape[1])
    # The table is read one tile ahead, so that no key waits for the number of its block.
    blocks = tile_blocks(table, lo, end, BLOCK_SIZE, BLOCK_N)
    for start in tl.range(lo, hi, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        offsets = blocks.to(tl.int64) * block_stride + (columns % BLOCK_SIZE) * HEAD_DIM
        blocks = tile_blocks(table, start + BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
        cells = offsets[:, None] + dims[None, :]
        if acc.shape[1] == HEAD_DIM:
            k = tl.load(keys + cells)
        else:
            k = tl.load(keys + cells, mask=dims[None, :] < HEAD_DIM, other=0.0)
        # What lies behind the last key may be anything, NaN too, which no weight of zero would hide.
        if acc.shape[1] != HEAD_DIM:
            v = tl.load(values + cells, mask=(columns[:, None] < end) & (dims[None, :] < HEAD_DIM), other=0.0)
        elif MASKED:
            v = tl.load(values + cells, mask=columns[:, None] < end, other=0.0)
        else:
            v = tl.load(values + cells)
        scores = scores_of(q, k, columns, positions, factor, slopes, SOFTCAP)
        if MASKED:
            visible = columns[None, :] <= positions[:, None]
            if WINDOW > 0:
                visible &= columns[None, :] > positions[:, None] - WINDOW
            scores = tl.where(visible, scores, float("-inf"))
        if SOFTCAP > 0 or slopes is not None:
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            weights = tl.exp2(scores - new_max[:, None])
        else:
            new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)
            weights = tl.exp2(scores * factor[:, None] - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def merge_splits(
    partials: tl.tensor,
    logs: tl.tensor,
    count: tl.tensor,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """[PADDED_ROWS, PADDED_DIM]: `count` partial results [ROWS, HEAD_DIM] weighted by 2 ** their logs [ROWS].

    Always in the same order, whichever split came last, so that the result does not depend on timing.
    """
    rows = tl.arange(0, PADDED_ROWS)
    dims = tl.arange(0, PADDED_DIM)
    row_max = tl.full([PADDED_ROWS], LOWEST, tl.float32)
    row_sum = tl.zeros([PADDED_ROWS], tl.float32)
    acc = tl.zeros([PADDED_ROWS, PADDED_DIM], tl.float32)
    for first in range(0, count, CHUNK):
        splits = first + tl.arange(0, CHUNK)
        there = (splits < count)[:, None] & (rows < ROWS)[None, :]
        cells = splits[:, None] * ROWS + rows[None, :]
        # Other programs wrote these just now: .cg reads past this multiprocessor's own cache.
        log = tl.load(logs + cells, mask=there, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(
            partials + cells[:, :, None] * HEAD_DIM + dims[None, None, :],
            mask=there[:, :, None] & (dims < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_max = tl.maximum(row_max, tl.max(log, 0))
        weight = tl.exp2(log - new_max[None, :])
        shrink = tl.exp2(row_max - new_max)
        acc = acc * shrink[:, None] + tl.sum(part * weight[:, :, None], 0)
        row_sum = row_sum * shrink + tl.sum(weight, 0)
        row_max = new_max
    return acc / row_sum[:, None]


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where the splits of one tile leave their parts for the last of them to merge. Launches on one
    stream may share it; nothing needs to be cleared in between.

    partials [rows, head_dim] float32, logs [rows] float32, counters [tiles] int32, zero between launches.
    """

    partials: torch.Tensor
    logs: torch.Tensor
    counters: torch.Tensor

    @classmethod
    def allocate(cls, rows: int, head_dim: int, tiles: int, device: torch.device | str) -> Workspace:
        return cls(
            torch.empty(rows * head_dim, dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
            torch.zeros(tiles, dtype=torch.int32, device=device),
        )

    def require(self, rows: int, head_dim: int, tiles: int) -> None:
        """Raises ValueError if a launch would need more room than there is."""
        if rows * head_dim > self.partials.numel() or rows > self.logs.numel():
            raise ValueError(f"the workspace has room for {self.logs.numel()} partial rows, not for {rows}")
        if tiles > self.counters.numel():
            raise ValueError(f"the workspace has {self.counters.numel()} counters, not {tiles}")


def attend_torch(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    seq_len: int,
    *,
    scale: float,
    softcap: float,
    window: int,
    alibi_slopes: torch.Tensor | None,
    query_scale: torch.Tensor | None,
) -> torch.Tensor:
    """One sequence in plain torch, densely and in float32: its last n tokens' queries q [n, num_heads,
    head_dim] over the first `seq_len` tokens in the blocks of `table` [max_blocks] -> the shape of q."""
    count, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = keys.shape
    blocks = table[: -(-seq_len // block_size)].long()
    group = num_heads // num_kv_heads
    k, v = (
        cache[blocks].transpose(0, 1).reshape(num_kv_heads, -1, head_dim)[:, :seq_len].float()
        for cache in (keys, values)
    )
    scores = q.transpose(0, 1).float() @ k.repeat_interleave(group, 0).transpose(1, 2) * scale
    if query_scale is not None:
        scores *= query_scale.float()[None, :, None]
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    columns = torch.arange(seq_len, device=q.device)
    distance = columns[None, :] - columns[seq_len - count :, None]
    if alibi_slopes is not None:
        scores += alibi_slopes.float()[:, None, None] * distance
    visible = distance <= 0
    if window > 0:
        visible &= distance > -window
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return (weights @ v.repeat_interleave(group, 0)).transpose(0, 1).to(q.dtype)
