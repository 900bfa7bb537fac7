"""How far a fetch has come, and a bar that shows it in a terminal."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Literal, TextIO

import msgspec

Phase = Literal["download", "convert"]

_REDRAW_S = 0.25
_LINE_S = 10.0
_BAR_CELLS = 24


class FetchProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a fetch has come. `bytes_total` is 0 while it is not known.

    `directory` is set once everything but the weights is in it, and stays the model's directory from
    then on: a tokenizer may be loaded from it while the weights still come.
    """

    bytes_done: int
    bytes_total: int
    directory: Path | None = None
    phase: Phase = "download"


class Meter:
    """How far a fetch has come, in a line of text, with how fast it goes and how long it still takes."""

    def __init__(self, label: str, bar: bool) -> None:
        self._label = label
        self._bar = bar
        self._phase: Phase | None = None
        self._first = (0.0, 0)

    def text(self, progress: FetchProgress) -> str:
        """The line for the newest state."""
        now = time.monotonic()
        # What an earlier, interrupted run brought says nothing about the speed of this one.
        if self._phase != progress.phase:
            self._phase, self._first = progress.phase, (now, progress.bytes_done)
        done, total = progress.bytes_done, progress.bytes_total
        doing = "converting, once: " if progress.phase == "convert" else ""
        if not total:
            return f"{self._label}: {_size(done)}" if done else f"{self._label}: looking up"
        share = min(done / total, 1.0)
        bar = ""
        if self._bar:
            filled = int(share * _BAR_CELLS)
            bar = "[" + "#" * filled + "." * (_BAR_CELLS - filled) + "] "
        started_at, started_with = self._first
        elapsed = now - started_at
        speed = ""
        if elapsed > 0.5 and done > started_with:
            rate = (done - started_with) / elapsed
            speed = f", {_size(rate)}/s"
            if done < total:
                speed += f", {_duration((total - done) / rate)} left"
        return f"{self._label}: {doing}{bar}{share:4.0%} of {_size(total)}{speed}"


class ProgressBar:
    """Shows FetchProgress on a stream: a line redrawn in a terminal, a line every 10 s elsewhere.

    Pass it as `on_progress` and call `close` (or leave its `with` block) when the fetch ends.
    """

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._meter = Meter(label, bar=self._terminal)
        self._drawn_at = float("-inf") if self._terminal else time.monotonic()
        self._text = ""
        self._width = 0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __call__(self, progress: FetchProgress) -> None:
        """Take in the newest state; draws only when enough time has passed."""
        self._text = self._meter.text(progress)
        if time.monotonic() - self._drawn_at >= (_REDRAW_S if self._terminal else _LINE_S):
            self._draw()

    def close(self) -> None:
        """Draw the last state and end the line."""
        if self._text:
            self._draw()
            if self._terminal:
                self._stream.write("\n")
                self._stream.flush()
            self._text = ""

    def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        if self._terminal:
            self._stream.write("\r" + self._text.ljust(self._width))
            self._width = len(self._text)
        else:
            self._stream.write(self._text + "\n")
        self._stream.flush()


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in ("B", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
