"""When graphs are captured: never before the first tokens, kept apart in traffic, in parts when idle.

What a capture does on a GPU is tested there; here a stand-in takes its place.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from runtime.engine import graphs
from runtime.engine.graphs import DecodeGraphs

SPACING = graphs._STEPS_BETWEEN_PAUSES


class StandIn:
    """A graph that only notes that it is replayed."""

    replayed = 0

    def capture_begin(self, **settings: Any) -> None:
        assert "pool" in settings

    def capture_end(self) -> None:
        pass

    def replay(self) -> None:
        StandIn.replayed += 1


class Steps:
    """The steps of some batch sizes, and which sizes were computed eagerly for them."""

    def __init__(self, max_size: int) -> None:
        self.eager: list[int] = []
        self.captured: list[int] = []
        self.graphs = DecodeGraphs(max_size, self._forward, lambda: (0, 1))

    def _forward(self, size: int) -> torch.Tensor:
        self.eager.append(size)
        return torch.zeros(size)

    def step(self, size: int) -> int:
        """One step of live traffic; the size that it was computed with."""
        if (due := self.graphs.due(size)) is not None:
            self.captured.append(due)
            self.graphs.capture(due)
        chosen = self.graphs.size_for(size)
        assert self.graphs.run(chosen).shape == (chosen,)
        return chosen


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(graphs, "adopted", lambda address, size: torch.zeros(size, dtype=torch.uint8))
    monkeypatch.setattr(StandIn, "replayed", 0)
    return Steps(32)


def test_the_first_steps_of_a_start_are_computed_without_graphs(steps: Steps) -> None:
    first = SPACING + 1
    assert [steps.step(3) for _ in range(first)] == [4] * first
    assert (steps.captured, steps.eager) == ([], [4] * first)
    steps.step(3)
    # What has been computed eagerly needs no further run to be captured.
    assert (steps.captured, steps.eager, StandIn.replayed) == ([4], [4] * (first + 1), 1)


def test_captures_in_traffic_are_kept_apart(steps: Steps) -> None:
    for number in range(10 * SPACING):
        steps.step((1, 3, 7)[number % 3])
    at = steps.captured
    assert sorted(at) == [1, 4, 8]
    assert steps.graphs.size_for(5) == 8


def test_until_a_size_has_its_graph_a_larger_one_will_do(steps: Steps) -> None:
    while not steps.captured:
        steps.step(16)
    assert steps.step(2) == 16
    assert steps.eager.count(2) == 0


def test_no_step_of_live_traffic_waits_for_another_run_and_a_capture(steps: Steps) -> None:
    while not steps.captured:
        steps.step(16)
    before = len(steps.eager)
    sizes = []
    while steps.captured == [16]:
        sizes.append(steps.step(2))
    # The size's first step is the traffic's own, long before its capture, which takes one run more.
    assert sizes.index(2) == SPACING
    assert sizes[SPACING + 1 : -1] == [16] * SPACING
    assert (sizes[-1], steps.eager[before:]) == (2, [2, 2])


def test_idle_time_makes_them_all_smallest_first_and_lets_go_in_between(steps: Steps) -> None:
    parts = 0
    while steps.graphs.advance():
        parts += 1
        assert len(steps.eager) == parts, "more than one run at a time"
    sizes = DecodeGraphs.sizes(32)
    assert steps.eager == [size for size in sizes for _ in range(2)]
    assert [steps.step(size) for size in sizes] == sizes
    assert (steps.captured, StandIn.replayed) == ([], len(sizes))
