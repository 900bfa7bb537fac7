"""CUDA graphs of decode steps, one for each of a few batch sizes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch

from runtime.engine.pace import uncollected
from runtime.kernels.adopted import adopted

# A capture keeps the host busy for a hundredth of a second or two, and so does a batch size's first step, for
# which kernels are loaded. While requests wait for tokens there is this much between one of them and the
# next, and before the first: by then the first tokens of a start are on their way.
_STEPS_BETWEEN_PAUSES = 16


class DecodeGraphs:
    """Captures `forward(size)` and replays it from then on.

    `forward` reads its inputs from where they always lie and returns a tensor, which each replay
    overwrites. Graphs of all sizes share their memory, which lies in the `pool` that is made before the
    first capture, so a result must be used before the next replay.
    """

    def __init__(
        self, max_size: int, forward: Callable[[int], torch.Tensor], pool: Callable[[], Any]
    ) -> None:
        self._sizes = self.sizes(max_size)
        self._forward = forward
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._make_pool = pool
        self._pool: Any = None
        self._warm: set[int] = set()
        self._steps_since_pause = 0

    @staticmethod
    def sizes(max_size: int) -> list[int]:
        """Batch sizes that get a graph: close together where they are small."""
        steps = [1, 2, 4, *range(8, 64, 8), *range(64, 257, 16), *range(288, max_size + 32, 32)]
        return [*(size for size in steps if size < max_size), max_size]

    def size_for(self, size: int) -> int:
        """The batch size to run `size` sequences with.

        That is the next size that gets a graph; until it has one, a larger one with a graph if there is any.
        But a step has to be computed without a graph before there can be one.
        """
        at = bisect_left(self._sizes, size)
        if self._may_pause and self._sizes[at] not in self._warm:
            return self._sizes[at]
        return next((larger for larger in self._sizes[at:] if larger in self._graphs), self._sizes[at])

    def due(self, size: int) -> int | None:
        """The size to capture now, before a step of `size` sequences; None if that has time.

        Captures are kept apart while steps follow each other; in idle time there is `advance`.
        """
        self._steps_since_pause += 1
        best = self._sizes[bisect_left(self._sizes, size)]
        is_due = self._may_pause and best in self._warm and best not in self._graphs
        return best if is_due else None

    @property
    def _may_pause(self) -> bool:
        return self._steps_since_pause > _STEPS_BETWEEN_PAUSES

    def run(self, size: int) -> torch.Tensor:
        """Compute a step of `size` sequences: from its graph if it has one."""
        if size not in self._graphs:
            if size not in self._warm:
                self._warm.add(size)
                self._steps_since_pause = 0
            return self._forward(size)
        graph, output = self._graphs[size]
        graph.replay()
        return output

    def advance(self) -> bool:
        """Do a part of what is missing, the smallest size first; whether there was anything to do.

        The inputs must be such that a run does no harm.
        """
        size = next((size for size in self._sizes if size not in self._graphs), None)
        if size is None:
            return False
        if size in self._warm:
            self.capture(size)
        else:
            self.run(size)
        return True

    def capture(self, size: int) -> None:
        """Make the graph for steps of `size` sequences, one of which must have been run: by then kernels are
        loaded, and libraries have allocated, outside the graph."""
        self._pool = self._pool or self._make_pool()
        graph = torch.cuda.CUDAGraph()
        with uncollected():
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            output = self._forward(size).contiguous()
            graph.capture_end()
        # The graph keeps its memory, and the output's is free for the other graphs.
        lent = adopted(output.data_ptr(), output.nbytes).view(output.dtype).view(output.shape)
        self._graphs[size] = graph, lent
        self._steps_since_pause = 0
