"""Sums over ranks on one GPU: each rank is a stream with an inbox of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

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

pytestmark = pytest.mark.gpu
RANKS, HIDDEN, EPS, CALLS = 2, 1024, 1e-5, 50


def inboxes(
    elements: int, dtype: torch.dtype, turns: int, max_rows: int, width: int
) -> tuple[torch.Tensor, list[Inboxes]]:
    """The memory, and each rank's end of it."""
    boxes = torch.empty((RANKS, elements), dtype=dtype, device="cuda")
    fill_with_marks(boxes)
    addresses = torch.tensor([box.data_ptr() for box in boxes], device="cuda")
    return boxes, [
        Inboxes(addresses, torch.zeros(turns, dtype=torch.int32, device="cuda"), rank, max_rows, width)
        for rank in range(RANKS)
    ]


def on_streams(work: Callable[[int], None]) -> None:
    """Run `work` for each rank, with what it launches in a stream of its own."""
    torch.cuda.synchronize()
    for rank in range(RANKS):
        with torch.cuda.stream(torch.cuda.Stream()):
            work(rank)
    torch.cuda.synchronize()


@pytest.mark.parametrize("rows", [1, 32, 60, 300])
def test_sums_one_after_the_other(rows: int) -> None:
    torch.manual_seed(rows)
    many = rows > 32
    elements = two_shot_elements(512, HIDDEN) if many else one_shot_elements(RANKS, 32, HIDDEN)
    _boxes, ends = inboxes(elements, torch.bfloat16, 512, 512 if many else 32, HIDDEN)
    add_up = two_shot if many else one_shot
    parts = torch.randn((CALLS, RANKS, rows, HIDDEN), device="cuda").bfloat16()
    residuals = torch.randn((1, rows, HIDDEN), device="cuda").bfloat16().repeat(RANKS, 1, 1)
    weight = torch.rand(HIDDEN, device="cuda") + 0.5
    outs = torch.zeros_like(parts)
    expected, residual = torch.empty_like(parts[:, 0]), residuals[0].clone()
    for call in range(CALLS):
        expected[call] = all_reduce_torch(list(parts[call]), (residual, weight, EPS))

    def work(rank: int) -> None:
        for call in range(CALLS):
            norm = (residuals[rank], weight, EPS)
            add_up(parts[call, rank], ends[rank], outs[call, rank], norm)

    on_streams(work)
    assert torch.equal(outs[:, 0], outs[:, 1])
    torch.testing.assert_close(outs[:, 0], expected, atol=0.05, rtol=0.05)
    mine = slice(1, None, RANKS) if many else slice(None)
    torch.testing.assert_close(residuals[1, mine], residual[mine], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_products_that_send(rows: int) -> None:
    torch.manual_seed(rows)
    _boxes, ends = inboxes(one_shot_elements(RANKS, 32, HIDDEN), torch.bfloat16, 32, 32, HIDDEN)
    x = torch.randn((CALLS, RANKS, rows, 512), device="cuda").bfloat16()
    weights = (torch.randn((RANKS, HIDDEN, 512), device="cuda") / 16).bfloat16()
    sent, computed = torch.zeros((2, CALLS, RANKS, rows, HIDDEN), device="cuda", dtype=torch.bfloat16)

    def send(rank: int) -> None:
        for call in range(CALLS):
            gemv(x[call, rank], weights[rank], x[call, rank], inboxes=ends[rank])
            one_shot(None, ends[rank], sent[call, rank])

    def compute(rank: int) -> None:
        for call in range(CALLS):
            part = gemv(x[call, rank], weights[rank], torch.empty_like(computed[call, rank]))
            one_shot(part, ends[rank], computed[call, rank])

    on_streams(send)
    on_streams(compute)
    assert torch.equal(sent, computed)
    parts = torch.einsum("crmk,rnk->crmn", x.float(), weights.float()).bfloat16()
    expected = torch.stack([all_reduce_torch(list(call)) for call in parts])
    torch.testing.assert_close(sent[:, 0], expected, atol=0.1, rtol=0.02)


def test_gathering() -> None:
    width, room = 1500, 32
    _boxes, ends = inboxes(
        gather_elements(RANKS, room, width), torch.float32, gather_blocks(room, width), room, width
    )
    made = torch.randn((CALLS, RANKS, room, width), device="cuda")
    outs = torch.zeros((CALLS, RANKS, room, RANKS * width), device="cuda")

    def work(rank: int) -> None:
        for call in range(CALLS):
            gather(made[call, rank], ends[rank], outs[call, rank])

    on_streams(work)
    for rank in range(RANKS):
        assert torch.equal(outs[:, rank], made.transpose(1, 2).reshape(CALLS, room, -1))
