"""The progress bar: what a person sees, in a terminal and in a log."""

from __future__ import annotations

import io

import pytest

from runtime.weights.sources import FetchProgress, ProgressBar
from runtime.weights.sources import progress as progress_module


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Clock:
    """Time that passes only when told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def _run(clock: _Clock, stream: io.StringIO, seconds: float, steps: int) -> None:
    """A download of 1 GB that goes on evenly."""
    with ProgressBar("org/name", stream) as bar:
        for step in range(steps + 1):
            bar(FetchProgress(bytes_done=10**9 * step // steps, bytes_total=10**9))
            clock.now += seconds / steps


def test_a_terminal_shows_one_line_redrawn_a_few_times_a_second(clock: _Clock) -> None:
    stream = _Terminal()
    _run(clock, stream, seconds=10, steps=1000)
    drawn = stream.getvalue()
    assert drawn.count("\n") == 1
    assert drawn.endswith("\n")
    assert 20 <= drawn.count("\r") <= 50
    middle = drawn.split("\r")[drawn.count("\r") // 2]
    assert "org/name: [###########.............]  49%" in middle
    assert "of 1.0 GB, 100.0 MB/s, 5 s left" in middle
    assert "100% of 1.0 GB" in drawn.split("\r")[-1]


def test_a_log_gets_a_line_every_ten_seconds_without_a_bar(clock: _Clock) -> None:
    stream = io.StringIO()
    _run(clock, stream, seconds=95, steps=1000)
    lines = stream.getvalue().splitlines()
    assert 9 <= len(lines) <= 11
    assert "\r" not in stream.getvalue()
    assert lines[0].startswith("org/name:  11% of 1.0 GB, 10.5 MB/s, 1 min 25 s left")
    assert lines[-1].startswith("org/name: 100% of 1.0 GB")


def test_what_an_earlier_run_brought_does_not_count_as_speed(clock: _Clock) -> None:
    stream = _Terminal()
    with ProgressBar("org/name", stream) as bar:
        bar(FetchProgress(bytes_done=900_000_000, bytes_total=10**9))
        clock.now += 10
        bar(FetchProgress(bytes_done=910_000_000, bytes_total=10**9))
    assert "1.0 MB/s, 1 min 30 s left" in stream.getvalue()


def test_nothing_is_written_where_nothing_was_fetched() -> None:
    stream = _Terminal()
    with ProgressBar("org/name", stream):
        pass
    assert stream.getvalue() == ""


def test_each_phase_is_named_and_has_its_own_speed(clock: _Clock) -> None:
    stream = _Terminal()
    with ProgressBar("org/name", stream) as bar:
        bar(FetchProgress(bytes_done=0, bytes_total=0))
        clock.now += 100
        bar(FetchProgress(bytes_done=0, bytes_total=4_000_000, phase="convert"))
        clock.now += 2
        bar(FetchProgress(bytes_done=4_000_000, bytes_total=4_000_000, phase="convert"))
    assert "org/name: looking up" in stream.getvalue()
    assert "converting, once: [########################] 100% of 4.0 MB, 2.0 MB/s" in stream.getvalue()
