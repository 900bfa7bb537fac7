"""The set of present bytes, against a plain set of positions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtime.weights.sources.intervals import Intervals

_RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)).map(lambda r: (r[0], r[0] + r[1])))


@given(_RANGES, st.integers(0, 55), st.integers(0, 55))
def test_it_behaves_like_a_set_of_positions(ranges: list[tuple[int, int]], start: int, end: int) -> None:
    intervals, model = Intervals(), set[int]()
    for first, last in ranges:
        new = set(range(first, last)) - model
        assert intervals.add(first, last) == len(new)
        model |= new
    assert intervals.total == len(model)
    assert {p for first, last in intervals.ranges() for p in range(first, last)} == model
    missing = intervals.missing(start, end)
    assert [p for first, last in missing for p in range(first, last)] == sorted(
        set(range(start, end)) - model
    )
    run = start
    while run in model:
        run += 1
    assert intervals.end_of_run(start) == run


@given(_RANGES)
def test_ranges_are_disjoint_and_do_not_touch(ranges: list[tuple[int, int]]) -> None:
    intervals = Intervals()
    for first, last in ranges:
        intervals.add(first, last)
    bounds = [bound for pair in intervals.ranges() for bound in pair]
    assert bounds == sorted(set(bounds))
