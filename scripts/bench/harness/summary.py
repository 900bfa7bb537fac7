"""Medians, spreads and percentiles of repeated measurements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Summary:
    """What several measurements of one quantity say, all of them included, in the order they were taken."""

    values: tuple[float, ...]
    median: float
    low: float
    high: float

    @property
    def n(self) -> int:
        return len(self.values)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "n": self.n}


def summarize(values: Iterable[float]) -> Summary:
    """The median with the lowest and the highest value. Raises ValueError if there are none."""
    points = tuple(values)
    if not points:
        raise ValueError("nothing was measured")
    return Summary(points, statistics.median(points), min(points), max(points))


def ratios(ours: Iterable[float], theirs: Iterable[float]) -> Summary:
    """Ours in multiples of theirs, round by round: what a round has in common cancels out."""
    return summarize(mine / other for mine, other in zip(ours, theirs, strict=True))


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie, interpolated between neighbours."""
    if not values:
        raise ValueError("nothing was measured")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The three that are reported of every distribution."""
    return {"p50": percentile(values, 0.50), "p95": percentile(values, 0.95), "p99": percentile(values, 0.99)}
