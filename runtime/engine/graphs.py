"""CUDA graphs of decode steps, one for each of a few batch sizes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import torch


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

    @staticmethod
    def sizes(max_size: int) -> list[int]:
        """Batch sizes that get a graph: close together where they are small."""
        steps = [1, 2, 4, *range(8, 64, 8), *range(64, 257, 16), *range(288, max_size + 32, 32)]
        return [*(size for size in steps if size < max_size), max_size]

    def padded(self, size: int) -> int:
        """The batch size whose graph serves `size` sequences."""
        return self._sizes[bisect_left(self._sizes, size)]

    def __contains__(self, size: int) -> bool:
        return size in self._graphs

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
