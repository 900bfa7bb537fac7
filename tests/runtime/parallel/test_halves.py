"""Long sums by copies between ranks, and a decoder that computes a step in halves."""

from __future__ import annotations

import ctypes

import pytest
import torch

from runtime.kernels.gpu.all_reduce import all_reduce_torch
from runtime.kernels.gpu.parts import add_parts, add_parts_torch
from runtime.parallel.halves import Half, HalfMemory
from tests.runtime.kernels.forks import in_processes

if torch.cuda.is_available():
    pytest.skip("tests/gpu has the real ones", allow_module_level=True)

HIDDEN, EPS, MAX_ROWS = 40, 1e-5, 11
# Rows of each sum, fewer than ranks among them.
SUMS = (11, 2, 7, 1, 11, 4)
DTYPE = torch.float16


class Memory:
    """In place of the copy engines: other processes' memory is this one's, too."""

    def begin(self) -> None:
        """Everything is done in order."""

    def copy(self, target: int, source: torch.Tensor, flag: int, count: int) -> None:
        ctypes.memmove(target, source.data_ptr(), source.nbytes)
        ctypes.c_int32.from_address(flag).value = count


def made(number: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * number + rank)
    return torch.randn((SUMS[number], HIDDEN), generator=generator).to(DTYPE)


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_has_the_normed_sum(world_size: int) -> None:
    """Two halves by turns, as a step computes them."""
    num_bytes = HalfMemory.num_bytes(world_size, MAX_ROWS, HIDDEN)
    boxes = torch.full((2, world_size, num_bytes), 0x80, dtype=torch.uint8).share_memory_()
    outs = torch.zeros((2, world_size, len(SUMS), MAX_ROWS, HIDDEN), dtype=DTYPE).share_memory_()
    residuals = torch.randn((2, 1, MAX_ROWS, HIDDEN)).to(DTYPE).repeat(1, world_size, 1, 1).share_memory_()
    owned = torch.zeros((2, world_size, len(SUMS), MAX_ROWS, HIDDEN), dtype=DTYPE).share_memory_()
    before = residuals[:, 0].clone()
    weight = torch.rand(HIDDEN) + 0.5

    def work(rank: int) -> None:
        halves = []
        for box in boxes:
            addresses = [each.data_ptr() for each in box]
            halves.append(Half(Memory(), HalfMemory(addresses, box[rank], rank, MAX_ROWS, HIDDEN, DTYPE)))
        for number, rows in enumerate(SUMS):
            for half in halves:
                half.send(made(number, rank))
            for index, half in enumerate(halves):
                residual = residuals[index, rank, :rows].clone()
                half.settle(residual, weight, EPS)
                wanted = torch.arange(rows)
                owned[index, rank, number, :rows] = half.own_of(residual, wanted)
            for index, half in enumerate(halves):
                outs[index, rank, number, :rows] = half.received()
                assert not half.under_way

    in_processes(world_size, work)
    for number, rows in enumerate(SUMS):
        for index in range(2):
            residual = before[index, :rows].clone()
            parts = [made(number, rank) for rank in range(world_size)]
            expected = all_reduce_torch(parts, (residual, weight, EPS))
            for rank in range(world_size):
                found = outs[index, rank, number, :rows]
                torch.testing.assert_close(found, expected, atol=4e-3, rtol=4e-3)
                assert torch.equal(found, outs[index, 0, number, :rows])
            # Each row of the residual stream is held by exactly one rank.
            held = owned[index, :, number, :rows].float().sum(0)
            torch.testing.assert_close(held.to(DTYPE), residual, atol=4e-3, rtol=4e-3)


def test_parts_are_added_as_in_plain_torch() -> None:
    torch.manual_seed(0)
    x, residual = torch.randn((2, 5, HIDDEN)).to(DTYPE)
    parts = torch.randn((4, 6, HIDDEN)).to(DTYPE)
    weight = torch.rand(HIDDEN) + 0.5
    found, expected = torch.empty((2, 5, HIDDEN), dtype=DTYPE)
    other = residual.clone()
    add_parts(x, parts, residual, weight, EPS, found, 2)
    add_parts_torch(x, parts, other, weight, EPS, expected, 2)
    torch.testing.assert_close(found, expected, atol=4e-3, rtol=4e-3)
    torch.testing.assert_close(residual, other, atol=4e-3, rtol=4e-3)
