"""A fetch in a process of its own, whose files can be read while they come.

Reading sockets and importing torch would share Python's lock in one process, and both would be late.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec

from runtime.errors import FirstlightError
from runtime.weights.sources.errors import SourceError, SourceErrorKind
from runtime.weights.sources.landing import Landing
from runtime.weights.sources.progress import FetchProgress, Phase
from runtime.weights.sources.reference import Reference

# A process that was killed is started again: it continues where it was.
_MAX_STARTS = 3
_POLL_S = 0.01


class Came(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """`FetchProgress`, as the process says it."""

    bytes_done: int
    bytes_total: int
    phase: Phase
    directory: str | None = None


class Done(msgspec.Struct, frozen=True, tag=True):
    """The model is complete in this directory."""

    directory: str


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The fetch ended with a SourceError of this kind, or with another error that is meant for people."""

    kind: SourceErrorKind | None
    message: str


Said = Came | Done | Failed


class Arrival:
    """A model's files on their way. Making it starts the fetch.

    `on_progress` is called from a thread of the arrival's own.
    """

    def __init__(
        self, reference: Reference, cache_dir: Path, on_progress: Callable[[FetchProgress], None]
    ) -> None:
        self._command = [sys.executable, "-m", "runtime.weights.sources", reference.url, str(cache_dir)]
        self._on_progress = on_progress
        self._changed = threading.Condition()
        self._directory: Path | None = None
        self._error: Exception | None = None
        self._ended = False
        self._stop = threading.Event()
        self._landing: Landing | None = None
        self._process = self._start()
        self._thread = threading.Thread(target=self._run, name="arrival", daemon=True)
        self._thread.start()

    @property
    def directory(self) -> Path:
        """The model's directory, once everything but the weights is in it. Raises what the fetch raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._directory is not None or self._ended)
            if self._directory is None:
                assert self._error is not None
                raise self._error
            return self._directory

    @property
    def ended(self) -> bool:
        """Whether the fetch has ended, one way or another."""
        return self._ended

    @property
    def gate(self) -> Landing:
        """The `Gate` through which the files can be read from now on."""
        self._landing = self._landing or Landing(self.directory, self._stop)
        return self._landing

    def confirm(self) -> None:
        """Wait until all that was read through the gate is known to be right. The gate stays open.

        Raises `Replaced` as soon as something was not, and what the fetch raised.
        """
        while not self.gate.check():
            with self._changed:
                if self._changed.wait_for(lambda: self._ended, _POLL_S):
                    break
        else:
            return
        if self._error is not None:
            raise self._error
        if not self.gate.check():
            raise AssertionError("a fetch ended well, without all of its files in place")

    def end(self) -> None:
        """Wait for the end of the fetch. Raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def settle(self) -> bool:
        """Wait for the end of the fetch; whether all that was read through the gate was right.

        If not, it is there by now, and must be read again. Raises what the fetch raised.
        """
        self.end()
        if self._landing is None:
            return True
        right = self._landing.verified()
        self._landing.close()
        return right

    def give_up(self) -> None:
        """End the fetch; what has come stays in the cache, where the next fetch finds it."""
        self._end(FirstlightError("The fetch was given up."))
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._thread.join()

    def _run(self) -> None:
        try:
            for start in range(_MAX_STARTS):
                if start:
                    self._process = self._start()
                status = self._listen(self._process)
                if self._ended:
                    return
            raise FirstlightError(
                f"The process that fetches the model ended with status {status}, {_MAX_STARTS} times in a "
                "row; its own messages are on stderr. Start again: it continues where it stopped."
            )
        except Exception as error:  # also what `on_progress` raises: whoever waits must hear of it
            self._end(error)

    def _start(self) -> subprocess.Popen[bytes]:
        # It ends when its input does: with this process, however this one ends.
        return subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def _listen(self, process: subprocess.Popen[bytes]) -> int:
        """Take what the process says until it ends; its exit status."""
        with process:
            assert process.stdout is not None
            self._take(process.stdout)
        return process.returncode

    def _take(self, lines: IO[bytes]) -> None:
        for line in lines:
            match msgspec.json.decode(line, type=Said):
                case Came(done, total, phase, directory):
                    found = None if directory is None else Path(directory)
                    self._note_directory(found)
                    self._on_progress(
                        FetchProgress(bytes_done=done, bytes_total=total, directory=found, phase=phase)
                    )
                case Done(directory):
                    self._note_directory(Path(directory))
                    self._end()
                case Failed(kind, message):
                    self._end(SourceError(kind, message) if kind else FirstlightError(message))

    def _note_directory(self, directory: Path | None) -> None:
        if directory is not None and self._directory is None:
            with self._changed:
                self._directory = directory
                self._changed.notify_all()

    def _end(self, error: Exception | None = None) -> None:
        with self._changed:
            self._error = error
            self._ended = True
            self._changed.notify_all()
        if error is not None:
            self._stop.set()
