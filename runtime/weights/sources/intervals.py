"""A set of byte positions, kept as disjoint ranges: which bytes of a file are here."""

from __future__ import annotations

from bisect import bisect_left, bisect_right


class Intervals:
    """Half-open ranges [start, end), disjoint, not touching, in order."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.total = 0

    def add(self, start: int, end: int) -> int:
        """Add [start, end) and return how many positions of it were new."""
        if start >= end:
            return 0
        # Every range from `first` up to `last` overlaps or touches the new one and merges with it.
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        before = sum(self._ends[i] - self._starts[i] for i in range(first, last))
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]
        added = end - start - before
        self.total += added
        return added

    def end_of_run(self, position: int) -> int:
        """Where the run of present positions from `position` on ends; `position` itself if absent."""
        i = bisect_right(self._starts, position) - 1
        return max(position, self._ends[i]) if i >= 0 else position

    def missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """The ranges within [start, end) that are absent, in order."""
        gaps = []
        position = start
        for i in range(bisect_right(self._ends, start), len(self._starts)):
            if self._starts[i] >= end:
                break
            if self._starts[i] > position:
                gaps.append((position, self._starts[i]))
            position = self._ends[i]
        if position < end:
            gaps.append((position, end))
        return gaps

    def ranges(self) -> list[tuple[int, int]]:
        """All ranges, in order."""
        return list(zip(self._starts, self._ends, strict=True))
