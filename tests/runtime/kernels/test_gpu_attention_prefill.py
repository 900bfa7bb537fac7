"""Prefill attention over the paged cache against torch's own attention on contiguous keys and values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from runtime.kernels.gpu.attention_prefill import (
    MIN_SPLIT_KEYS,
    paged_prefill,
    paged_prefill_torch,
    prefill_splits,
    prefill_tile,
    prefill_work_items,
    prefill_workspace,
)
from runtime.kernels.gpu.attention_tile import Workspace
from tests.runtime.kernels.paged_attention import FEATURES, Paged, Shape, feature_cases

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of rows not in use
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (new tokens, all tokens): a first chunk of one token, some that end on and around the ends of tiles and
# blocks, a later chunk, a short extension of a long history, a single new token.
CHUNKS = [(1, 1), (32, 32), (33, 64), (40, 140), (3, 161), (1, 97)]
# Rounding of what is compared: float32 sums in another order, and half an ulp of a float16 near 4 on top
# of weights rounded to 11 bits.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


def batch(shape: Shape, chunks: list[tuple[int, int]]) -> Paged:
    return Paged.random(shape, [new for new, _ in chunks], [length for _, length in chunks])


def workspace_for(shape: Shape) -> Workspace:
    workspace = prefill_workspace(shape.num_kv_heads, shape.head_dim, shape.dtype.itemsize, 132, shape.device)
    workspace.partials.fill_(math.nan)
    workspace.logs.fill_(math.nan)
    return workspace


def run(
    paged: Paged, num_splits: int = 1, workspace: Workspace | None = None, **features: Any
) -> torch.Tensor:
    shape = paged.shape
    tile = prefill_tile(shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.dtype.itemsize)
    return paged_prefill(
        paged.q,
        paged.keys,
        paged.values,
        paged.block_tables,
        paged.query_start,
        paged.ints(paged.seq_lens),
        paged.ints(prefill_work_items(paged.counts, paged.seq_lens, tile)),
        torch.full_like(paged.out, math.nan),
        table_rows=paged.table_rows,
        num_splits=num_splits,
        workspace=workspace or workspace_for(shape),
        **features,
    )


def check(paged: Paged, num_splits: int = 1, **features: Any) -> None:
    features = {"scale": paged.shape.head_dim**-0.5, **features}
    expected = paged.expected(**features)
    tolerance = TOLERANCE[paged.shape.dtype]
    out = run(paged, num_splits, **features)
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=0)
    twin = paged_prefill_torch(
        paged.q,
        paged.keys,
        paged.values,
        paged.block_tables,
        paged.query_start,
        paged.ints(paged.seq_lens),
        paged.out,
        table_rows=paged.table_rows,
        **features,
    )
    torch.testing.assert_close(twin.float(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize(("dtype", "num_splits"), [(torch.float32, 3), (torch.float16, 1)])
def test_features(name: str, dtype: torch.dtype, num_splits: int) -> None:
    paged = batch(Shape(dtype=dtype, device=DEVICE), CHUNKS)
    check(paged, num_splits, **feature_cases(4, len(paged.q), DEVICE)[name])


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (5, 1), (12, 2), (14, 2), (16, 1), (20, 1)])
def test_group_sizes(num_heads: int, num_kv_heads: int) -> None:
    check(batch(Shape(num_heads, num_kv_heads, device=DEVICE), [(9, 9), (7, 70)]))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(head_dim: int) -> None:
    shape = Shape(head_dim=head_dim, dtype=torch.float16, device=DEVICE)
    check(batch(shape, [(65, 65), (20, 150)]))


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_block_sizes(block_size: int) -> None:
    shape = Shape(block_size=block_size, dtype=torch.float16, device=DEVICE)
    check(batch(shape, [(128, 128), (129, 129), (2, 257)]), 2)


def test_without_table_rows_sequences_use_their_own_lines() -> None:
    paged = batch(Shape(device=DEVICE), CHUNKS)
    plain = run(paged, scale=0.125)
    paged.block_tables = paged.block_tables[paged.table_rows.long()]
    paged.table_rows = None
    assert torch.equal(run(paged, scale=0.125), plain)


def test_a_workspace_serves_launch_after_launch_with_the_same_bits() -> None:
    paged = batch(Shape(device=DEVICE), CHUNKS)
    workspace = workspace_for(paged.shape)
    first = run(paged, 3, workspace, scale=0.125)
    assert torch.equal(run(paged, 3, workspace, scale=0.125), first)


def test_a_workspace_that_is_missing_or_too_small_is_refused() -> None:
    paged = batch(Shape(device=DEVICE), [(40, 300)])
    arguments = (
        paged.q,
        paged.keys,
        paged.values,
        paged.block_tables,
        paged.query_start,
        paged.ints(paged.seq_lens),
        paged.ints([[0, 0]]),
        paged.out,
    )
    with pytest.raises(ValueError, match="2 splits need a workspace"):
        paged_prefill(*arguments, scale=1.0, num_splits=2)
    with pytest.raises(ValueError, match="room for 1 partial rows"):
        paged_prefill(
            *arguments, scale=1.0, num_splits=2, workspace=Workspace.allocate(1, 64, 2, paged.shape.device)
        )


@pytest.mark.parametrize("tile", [1, 7, 32])
def test_work_items_cover_every_new_token_once_and_begin_with_the_longest(tile: int) -> None:
    counts, seq_lens = [1, 64, 0, 65, 3], [500, 64, 9, 90, 3]
    items = prefill_work_items(counts, seq_lens, tile)
    assert items.dtype == np.int32
    covered = [
        (sequence, token)
        for sequence, first in items.tolist()
        for token in range(first, min(first + tile, counts[sequence]))
    ]
    assert sorted(covered) == [(s, t) for s, count in enumerate(counts) for t in range(count)]
    keys = [seq_lens[s] - counts[s] + min(first + tile, counts[s]) for s, first in items.tolist()]
    assert keys == sorted(keys, reverse=True)


def test_no_new_tokens_no_work_items() -> None:
    assert prefill_work_items([], [], 32).shape == (0, 2)


def test_splits_only_where_tiles_are_few_and_keys_many() -> None:
    assert prefill_splits(1, 8, 7500, num_sms=132) > 1
    assert prefill_splits(1, 8, MIN_SPLIT_KEYS, num_sms=132) == 1
    assert prefill_splits(100, 8, 7500, num_sms=132) == 1
    assert prefill_splits(0, 8, 7500, num_sms=132) == 1
