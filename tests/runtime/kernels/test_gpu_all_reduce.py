"""Sums over ranks by writing into each other's memory: real processes, the kernels interpreted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from runtime.kernels.gpu.all_reduce import all_reduce_torch, gather, one_shot, two_shot
from runtime.kernels.gpu.gemv import gemv
from runtime.kernels.gpu.inboxes import (
    Inboxes,
    fill_with_marks,
    gather_blocks,
    gather_elements,
    one_shot_elements,
    two_shot_elements,
)
from runtime.kernels.gpu.prefetch import CHUNK_BYTES, MAX_BYTES, prefetch_programs
from tests.runtime.kernels.forks import in_processes

if torch.cuda.is_available():
    pytest.skip("tests/gpu has the real ones", allow_module_level=True)

HIDDEN, EPS = 40, 1e-5
# Rows of each call: every slot is used several times, by more rows and by fewer.
CALLS = (3, 1, 8, 8, 2, 8, 5, 1, 1, 1)
DTYPE = torch.float16


def parts(call: int, world_size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(call)
    made = torch.randn((world_size, CALLS[call], HIDDEN), generator=generator).to(DTYPE)
    made[:, :, ::7] = -0.0
    return list(made)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("way", [one_shot, two_shot])
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_has_the_sum_of_all(
    world_size: int, way: Callable[..., torch.Tensor], normed: bool
) -> None:
    elements = one_shot_elements(world_size, 8, HIDDEN) if way is one_shot else two_shot_elements(8, HIDDEN)
    boxes = torch.empty((world_size, elements), dtype=DTYPE).share_memory_()
    fill_with_marks(boxes)
    outs = torch.zeros((world_size, len(CALLS), 8, HIDDEN), dtype=DTYPE).share_memory_()
    residuals = torch.randn((1, 8, HIDDEN)).to(DTYPE).repeat(world_size, 1, 1).share_memory_()
    weight = torch.rand(HIDDEN) + 0.5
    expected_residual = residuals[0].clone()

    def work(rank: int) -> None:
        addresses = torch.tensor([box.data_ptr() for box in boxes])
        turns = torch.zeros(8, dtype=torch.int32)
        inboxes = Inboxes(addresses, turns, rank, 8, HIDDEN)
        for call, rows in enumerate(CALLS):
            norm = (residuals[rank, :rows], weight, EPS) if normed else None
            way(parts(call, world_size)[rank], inboxes, outs[rank, call, :rows], norm)

    in_processes(world_size, work)
    for call, rows in enumerate(CALLS):
        norm = (expected_residual[:rows], weight, EPS) if normed else None
        expected = all_reduce_torch(parts(call, world_size), norm)
        for rank in range(world_size):
            torch.testing.assert_close(outs[rank, call, :rows], expected, atol=4e-3, rtol=4e-3)
            assert torch.equal(outs[rank], outs[0])
    if normed:
        for row in range(8):
            holders = [row % world_size] if way is two_shot else range(world_size)
            for rank in holders:
                torch.testing.assert_close(residuals[rank, row], expected_residual[row], atol=4e-3, rtol=4e-3)


def test_products_are_sent_while_they_are_computed() -> None:
    """Between sums whose parts were computed before: whoever sends, rows take the same turns."""
    world_size, width = 2, 24
    boxes = torch.empty((world_size, one_shot_elements(world_size, 16, HIDDEN)), dtype=DTYPE).share_memory_()
    fill_with_marks(boxes)
    x = torch.randn((len(CALLS), world_size, 8, width)).to(DTYPE)
    x[:, :, ::3] = 0.0
    weights = torch.randn((world_size, HIDDEN, width)).to(DTYPE)
    bias = torch.randn(HIDDEN).to(DTYPE)
    outs = torch.zeros((world_size, len(CALLS), 8, HIDDEN), dtype=DTYPE).share_memory_()

    def part(call: int, rank: int, out: torch.Tensor, inboxes: Inboxes | None = None) -> torch.Tensor:
        own = x[call, rank, : CALLS[call]].contiguous()
        return gemv(own, weights[rank], out, bias if rank else None, inboxes=inboxes)

    def work(rank: int) -> None:
        addresses = torch.tensor([box.data_ptr() for box in boxes])
        inboxes = Inboxes(addresses, torch.zeros(16, dtype=torch.int32), rank, 16, HIDDEN)
        for call, rows in enumerate(CALLS):
            out = outs[rank, call, :rows]
            if call % 3 == 2:
                one_shot(part(call, rank, torch.empty_like(out)), inboxes, out)
            else:
                part(call, rank, torch.full_like(out, torch.nan), inboxes)
                one_shot(None, inboxes, out)

    in_processes(world_size, work)
    for call, rows in enumerate(CALLS):
        made = [part(call, rank, torch.empty((rows, HIDDEN), dtype=DTYPE)) for rank in range(world_size)]
        for rank in range(world_size):
            torch.testing.assert_close(outs[rank, call, :rows], all_reduce_torch(made))


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_has_the_rows_of_all(world_size: int) -> None:
    width = 1500
    boxes = torch.empty((world_size, gather_elements(world_size, 8, width))).share_memory_()
    fill_with_marks(boxes)
    made = torch.randn((len(CALLS), world_size, 8, width))
    made[..., ::7] = -0.0
    made = made.share_memory_()
    outs = torch.zeros((world_size, len(CALLS), 8, world_size * width)).share_memory_()

    def work(rank: int) -> None:
        addresses = torch.tensor([box.data_ptr() for box in boxes])
        turns = torch.zeros(gather_blocks(8, width), dtype=torch.int32)
        inboxes = Inboxes(addresses, turns, rank, 8, width)
        for call, rows in enumerate(CALLS):
            gather(made[call, rank, :rows], inboxes, outs[rank, call, :rows])

    in_processes(world_size, work)
    for call, rows in enumerate(CALLS):
        expected = torch.cat(list(made[call, :, :rows]), dim=1)
        for rank in range(world_size):
            assert torch.equal(outs[rank, call, :rows], expected)


@pytest.mark.parametrize("num_bytes", [100, 1 << 20, 42 << 20, 235_000_000])
@pytest.mark.parametrize("num_warps", [4, 32])
def test_what_is_prefetched_lies_in_the_weights(num_bytes: int, num_warps: int) -> None:
    weights = torch.empty(num_bytes, dtype=torch.uint8, device="meta")
    programs, stride = prefetch_programs(weights, num_warps)
    chunks = programs * num_warps * 32
    assert chunks * CHUNK_BYTES <= MAX_BYTES
    assert stride % 16 == 0
    if programs:
        assert stride >= CHUNK_BYTES
        assert (chunks - 1) * stride + CHUNK_BYTES <= num_bytes
    else:
        assert num_bytes < 32 * num_warps * CHUNK_BYTES
