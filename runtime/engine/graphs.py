"""CUDA graphs of decode steps, one for each of a few batch sizes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import torch

# A capture holds up the stream that needs it for some tens of milliseconds.
_STEPS_BETWEEN_CAPTURES = 16


class DecodeGraphs:
    """Captures `forward(size)` and replays it from then on.

    `forward` reads its inputs from where they always lie and returns a tensor, which each replay
    overwrites. Graphs of all sizes share their memory, so a result must be used before the next replay.
    """

    def __init__(self, max_size: int, forward: Callable[[int], torch.Tensor]) -> None:
        self._sizes = self.sizes(max_size)
        self._forward = forward
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._since_capture = _STEPS_BETWEEN_CAPTURES

    @staticmethod
    def sizes(max_size: int) -> list[int]:
        """Batch sizes that get a graph: close together where they are small."""
        steps = [1, 2, 4, *range(8, 64, 8), *range(64, 257, 16), *range(288, max_size + 32, 32)]
        return [*(size for size in steps if size < max_size), max_size]

    def missing(self) -> int | None:
        """The smallest size that has not been captured; None when all have."""
        return next((size for size in self._sizes if size not in self._graphs), None)

    def choose(self, size: int) -> tuple[int, bool]:
        """The batch size to run `size` sequences with, and whether it must be captured first.

        While traffic flows, captures are kept apart: until the next one is due, a larger graph will do.
        """
        self._since_capture += 1
        at = bisect_left(self._sizes, size)
        best = self._sizes[at]
        if best not in self._graphs and self._since_capture < _STEPS_BETWEEN_CAPTURES:
            larger = next((other for other in self._sizes[at:] if other in self._graphs), None)
            best = larger or best
        return best, best not in self._graphs

    def replay(self, size: int) -> torch.Tensor:
        """Compute a step of `size` sequences, which has been captured."""
        graph, output = self._graphs[size]
        graph.replay()
        return output

    def capture(self, size: int) -> None:
        """Make the graph for steps of `size` sequences. The inputs must be such that a run does no harm."""
        # Once without capturing: kernels are compiled and loaded, and libraries allocate, outside the graph.
        self._forward(size)
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        output = self._forward(size)
        graph.capture_end()
        self._graphs[size] = graph, output
        self._since_capture = 0
