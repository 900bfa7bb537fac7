"""Compiled linear layers: right for every size and format, and the same bits in every company."""

from __future__ import annotations

import threading

import pytest
import torch

from runtime.kernels.linear import LinearWeights, linear, linear_torch
from tests.runtime.kernels.compiled import needs_kernels

pytestmark = needs_kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Around the widths at which the kernel changes its ways: 1 to 3 rows a tile, streamed or widened, blocks.
BATCHES = [1, 2, 3, 4, 7, 8, 9, 31, 33, 65, 97]
PARTS = [(1,), (4,), (6,), (64, 31), (33, 7, 12)]


def random_weights(
    parts: tuple[int, ...], k: int, dtype: torch.dtype, strided: bool = False
) -> LinearWeights:
    """Weights of which every second part has a bias; strided ones are cut out of longer, unaligned rows."""
    weights, biases = [], []
    for index, rows in enumerate(parts):
        whole = torch.randn(rows, k + 5).to(dtype)
        weights.append(whole[:, 3 : k + 3] if strided else whole[:, :k].contiguous())
        biases.append(torch.randn(rows) if index % 2 == 0 else None)
    made = LinearWeights(weights, biases)
    assert made.lib is not None, "these weights should have gone to the compiled kernel"
    return made


def assert_close_to_twin(x: torch.Tensor, weights: LinearWeights) -> None:
    """Within the rounding of a sum of products in float32, in any order."""
    exact = linear_torch(x.double(), weights)
    magnitudes = LinearWeights([w.float().abs() for w in weights.weights])
    allowed = 1e-6 * (linear_torch(x.double().abs(), magnitudes) + 1)
    assert bool(((linear(x, weights).double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_any_size(dtype: torch.dtype, strided: bool) -> None:
    torch.manual_seed(0)
    for k in (1, 3, 16, 31, 100, 1024, 1030, 2049):
        for parts in PARTS:
            weights = random_weights(parts, k, dtype, strided)
            for m in BATCHES if k < 1000 else (1, 5, 33):
                assert_close_to_twin(torch.randn(m, k), weights)


def test_no_rows_at_all() -> None:
    weights = random_weights((5, 4), 40, torch.float16)
    assert linear(torch.empty(0, 40), weights).shape == (0, 9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [40, 1100])
def test_a_row_has_the_same_bits_in_every_batch(dtype: torch.dtype, k: int) -> None:
    torch.manual_seed(1)
    weights = random_weights((70, 33), k, dtype)
    x = torch.randn(200, k)
    alone = torch.cat([linear(row[None], weights) for row in x])
    for m in (*BATCHES, 200):
        for first in (0, 200 - m):
            assert torch.equal(linear(x[first : first + m], weights), alone[first : first + m])


def test_every_half_is_read_exactly() -> None:
    """All finite numbers of either format, subnormal ones included, come through unchanged."""
    for dtype in (torch.float16, torch.bfloat16):
        numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
        column = numbers[numbers.float().isfinite()][:, None].contiguous()
        one = torch.ones(1, 1)
        assert torch.equal(linear(one, LinearWeights([column]))[0], column[:, 0].float())
        # A row as wide as any vector takes the other way of reading.
        row = torch.cat([column, torch.zeros_like(column).expand(-1, 63)], dim=1)
        assert torch.equal(linear(torch.ones(1, 64), LinearWeights([row]))[0], column[:, 0].float())


def test_callers_from_many_threads_do_not_disturb_each_other() -> None:
    torch.manual_seed(2)
    weights = random_weights((500, 500), 200, torch.float16)
    inputs = [torch.randn(m, 200) for m in (1, 3, 20, 40)]
    expected = [linear(x, weights) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        if not all(torch.equal(linear(inputs[index], weights), expected[index]) for _ in range(100)):
            wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
