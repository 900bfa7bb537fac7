"""Decode attention over the paged cache against torch's own attention on contiguous keys and values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from runtime.kernels.gpu.attention_decode import (
    decode_workspace,
    min_split_keys,
    paged_decode,
    paged_decode_torch,
    splits_for,
)
from runtime.kernels.gpu.attention_tile import Workspace
from tests.runtime.kernels.paged_attention import FEATURES, NOWHERE, Paged, Shape, feature_cases

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of rows not in use
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One key, one before and behind the ends of blocks, tiles and splits, and several splits.
SEQ_LENS = [1, 31, 32, 33, 256, 257, 600]
# Rounding of what is compared: float32 sums in another order, and half an ulp of a float16 near 4 on top
# of weights rounded to 11 bits.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


def batch(shape: Shape, seq_lens: list[int]) -> Paged:
    return Paged.random(shape, [1] * len(seq_lens), seq_lens)


def workspace_for(paged: Paged, num_splits: int) -> Workspace:
    shape = paged.shape
    workspace = decode_workspace(
        len(paged.seq_lens), shape.num_heads, shape.num_kv_heads, shape.head_dim, num_splits, shape.device
    )
    workspace.partials.fill_(math.nan)
    workspace.logs.fill_(math.nan)
    return workspace


def run(
    paged: Paged, num_splits: int = 3, workspace: Workspace | None = None, **features: Any
) -> torch.Tensor:
    return paged_decode(
        paged.q,
        paged.keys,
        paged.values,
        paged.block_tables,
        paged.table_rows,
        paged.ints(paged.seq_lens),
        torch.full_like(paged.out, math.nan),
        num_splits=num_splits,
        workspace=workspace or workspace_for(paged, num_splits),
        **features,
    )


def check(paged: Paged, num_splits: int = 3, **features: Any) -> None:
    features = {"scale": paged.shape.head_dim**-0.5, **features}
    expected = paged.expected(**features)
    tolerance = TOLERANCE[paged.shape.dtype]
    out = run(paged, num_splits, **features)
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=0)
    twin = paged_decode_torch(
        paged.q,
        paged.keys,
        paged.values,
        paged.block_tables,
        paged.table_rows,
        paged.ints(paged.seq_lens),
        paged.out,
        **features,
    )
    torch.testing.assert_close(twin.float(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_features(name: str, dtype: torch.dtype) -> None:
    paged = batch(Shape(dtype=dtype, device=DEVICE), SEQ_LENS)
    check(paged, **feature_cases(4, len(SEQ_LENS), DEVICE)[name])


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (5, 1), (12, 2), (14, 2), (16, 1), (20, 1)])
def test_group_sizes(num_heads: int, num_kv_heads: int) -> None:
    check(batch(Shape(num_heads, num_kv_heads, device=DEVICE), [1, 45, 300]))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(head_dim: int) -> None:
    check(batch(Shape(head_dim=head_dim, dtype=torch.float16, device=DEVICE), [65, 300]))


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("num_splits", [1, 2, 5])
def test_blocks_and_splits(block_size: int, num_splits: int) -> None:
    check(batch(Shape(block_size=block_size, device=DEVICE), [1, 127, 128, 129, 600]), num_splits)


def test_padding_rows_become_zeros_and_read_nothing() -> None:
    paged = batch(Shape(device=DEVICE), [0, 200, 0])
    paged.table_rows[::2] = NOWHERE
    out = run(paged, scale=0.125)
    torch.testing.assert_close(out, paged.expected(scale=0.125), atol=1e-5, rtol=0)
    assert not out[::2].any()


def test_a_workspace_serves_launch_after_launch_with_the_same_bits() -> None:
    paged = batch(Shape(device=DEVICE), SEQ_LENS)
    workspace = workspace_for(paged, 3)
    first = run(paged, 3, workspace, scale=0.125)
    assert torch.equal(run(paged, 2, workspace, scale=0.125), run(paged, 2, scale=0.125))
    assert torch.equal(run(paged, 3, workspace, scale=0.125), first)


def test_a_workspace_that_is_too_small_is_refused() -> None:
    paged = batch(Shape(device=DEVICE), [300, 300])
    with pytest.raises(ValueError, match="room for 8 partial rows, not for 16"):
        run(paged, 2, workspace_for(paged, 1), scale=0.125)
    with pytest.raises(ValueError, match="2 counters, not 4"):
        run(paged, 1, decode_workspace(1, 8, 2, 64, 1, DEVICE), scale=0.125)


@pytest.mark.parametrize(("batch_size", "num_kv_heads", "max_len"), [(1, 8, 8192), (8, 8, 4096), (3, 2, 600)])
def test_splits_fill_the_device_without_crumbs(batch_size: int, num_kv_heads: int, max_len: int) -> None:
    splits = splits_for(batch_size, num_kv_heads, max_len)
    fewest = min_split_keys(batch_size, num_kv_heads)
    assert 1 < splits <= max_len // fewest
    assert splits_for(256, num_kv_heads, max_len) <= splits
    assert splits_for(batch_size, num_kv_heads, fewest) == 1
    assert splits_for(4000, num_kv_heads, max_len) == 1
