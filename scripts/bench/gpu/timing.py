"""Time on the device alone: what is timed is captured into a CUDA graph, and replays of it are timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

_ROUNDS = 7
_ROUND_SECONDS = 0.004
L2_FLUSHING_BYTES = 1 << 30
"""What launches in a row should read together, so that none finds its data in the L2 cache."""


def replay_seconds(step: Callable[[], object]) -> float:
    """The median time of one replay of everything that `step` launches."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    _replays(graph, 1)
    once = _replays(graph, 1)
    repeats = max(1, min(50, round(_ROUND_SECONDS / once)))
    return statistics.median(_replays(graph, repeats) / repeats for _ in range(_ROUNDS))


def _replays(graph: torch.cuda.CUDAGraph, count: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000
