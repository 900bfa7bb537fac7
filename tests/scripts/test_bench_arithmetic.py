"""The benchmarks' own arithmetic, against numpy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from harness import limits_cpu
from harness.summary import percentile, percentiles, ratios, summarize
from harness.table import number, render, spread
from hypothesis import given
from hypothesis import strategies as st

FINITE = st.floats(-1e6, 1e6)


def test_summary_keeps_every_point_and_takes_the_middle() -> None:
    found = summarize([3.0, 1.0, 10.0, 2.0])
    assert (found.median, found.low, found.high, found.n) == (2.5, 1.0, 10.0, 4)
    assert found.as_json()["values"] == (3.0, 1.0, 10.0, 2.0)


def test_nothing_measured_is_an_error() -> None:
    for summary in (summarize, percentiles):
        with pytest.raises(ValueError, match="nothing"):
            summary([])


@given(st.lists(FINITE, min_size=1), st.floats(0, 1))
def test_percentiles_are_numpys(values: list[float], share: float) -> None:
    assert percentile(values, share) == pytest.approx(float(np.quantile(values, share)), abs=1e-6)


def test_ratios_are_taken_within_a_round() -> None:
    # The machine was half as fast in the second round; who is twice as fast stays so.
    assert ratios([100.0, 50.0], [50.0, 25.0]).values == (2.0, 2.0)
    with pytest.raises(ValueError):
        ratios([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1234, "0.123"), (4.567, "4.57"), (89.12, "89.1"), (12345.6, "12,346"), (-2, "-2.00")],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_a_single_value_has_no_spread() -> None:
    assert spread(summarize([2.0])) == "2.00"
    assert spread(summarize([2.0, 4.0])) == "3.00 (2.00 to 4.00)"


def test_columns_line_up() -> None:
    lines = render(["", "speed"], [["a long name", "1"], ["b", "1,000"]]).splitlines()
    assert lines == ["             speed", "-----------  -----", "a long name      1", "b            1,000"]


def test_limits_are_possible_speeds() -> None:
    # No machine that this runs on reads less than 0.1 GB/s or more than 10 TB/s.
    assert 1e8 < limits_cpu.memory_read(1) < 1e13
    assert 1e8 < limits_cpu.matrix_product() < 1e15
