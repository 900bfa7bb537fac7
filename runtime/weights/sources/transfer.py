"""Many ranged reads at once into the files of one download, resumed, retried, verified."""

from __future__ import annotations

import heapq
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.weights.sources import retry
from runtime.weights.sources.errors import SourceError
from runtime.weights.sources.journal import Journal
from runtime.weights.sources.partial import PartialFile, Stopped
from runtime.weights.sources.remote import RangeReply, Remote, RemoteFile, Transient

if TYPE_CHECKING:
    from runtime.weights.sources.mover import Body

# One ranged read asks for this much, and towards the end for less, so that all connections end together.
# Asking takes a millisecond of Python's lock (at S3 nearly two), which is what so many connections lack.
RANGE_BYTES = 128 << 20
LAST_RANGE_BYTES = 16 << 20
# A killed process loses at most one block per connection, or what came in a quarter of a second if that is
# less. Blocks end at multiples of this, so that what the mover writes at once does not straddle two.
BLOCK_BYTES = 8 << 20
# A file is verified by one thread, from its beginning on: so that many files are brought at once.
FILES_AT_ONCE = 8
_REPORT_S = 0.1
_VERIFYING_NICENESS = 10
# Once there is nothing left to ask for, nobody waits longer than this for a connection that has gone silent.
SILENT_S = 3.0


def turn(number: int, start: int) -> tuple[int, int]:
    """When the byte `start` of file `number` is due: what has the smaller turn comes first.

    The headers of all files come before all else: from them it is planned where the rest belongs.
    """
    return (number // FILES_AT_ONCE, start) if start else (-1, 0)


class _Ranges:
    """What nobody has asked for yet, to be taken range by range in the order in which it is due."""

    def __init__(self, files: Sequence[PartialFile], connections: int) -> None:
        gaps = [(i, *gap) for i, file in enumerate(files) for gap in file.missing(0, file.file.size)]
        self._files = files
        self._due = [(turn(i, start), i, start, end) for i, start, end in gaps]
        heapq.heapify(self._due)
        self._left = sum(end - start for _, start, end in gaps)
        self._least = min(RANGE_BYTES, LAST_RANGE_BYTES)
        self.connections = min(connections, sum(-(-(end - start) // self._least) for _, start, end in gaps))

    def __bool__(self) -> bool:
        return bool(self._due)

    def take(self) -> tuple[PartialFile, int, int]:
        """The next range: the file, where it starts and where it ends."""
        _, number, start, end = heapq.heappop(self._due)
        fair = self._left // self.connections // BLOCK_BYTES * BLOCK_BYTES
        stop = min(end, start + max(self._least, min(RANGE_BYTES, fair)))
        if stop < end:
            heapq.heappush(self._due, (turn(number, stop), number, stop, end))
        self._left -= stop - start
        return self._files[number], start, stop


class _RangesIgnored(Exception):
    """The server answered a ranged read with the whole file."""


class Download:
    """The download of chosen files of one remote version into an entry.

    Files come into `partial_dir` and are renamed into `final_dir` as soon as they are verified.
    """

    def __init__(self, remote: Remote, journal: Journal, partial_dir: Path, final_dir: Path) -> None:
        self._remote = remote
        self._journal = journal
        self._partial_dir = partial_dir
        self._final_dir = final_dir

    def bytes_done(self, file: RemoteFile) -> int:
        """How many of the file's bytes are on the disk."""
        return file.size if self._in_place(file) else self._journal.done(file.name).total

    def drop_damaged(self, files: Sequence[RemoteFile], doubtful: bool) -> None:
        """Delete files in their final place that have not the size they should have.

        If they are all `doubtful`, those that have a digest are verified again, and the others come again.
        """
        for file in files:
            place = self._final_dir / file.name
            if not self._in_place(file):
                place.unlink(missing_ok=True)
            elif doubtful and file.is_verifiable:
                place.replace(self._partial_dir / file.name)
                self._journal.append(file.name, 0, file.size)
                self._journal.done(file.name).add(0, file.size)
            elif doubtful:
                place.unlink()

    def run(self, files: Sequence[RemoteFile], report: Callable[[], None]) -> None:
        """Bring all `files` to their final place; `report` is called a few times a second.

        A file whose content fails verification is fetched once more from the start, by this process or, if
        it does not live that long, by another that continues the download.
        """
        pending = [file for file in files if not self._in_place(file)]
        while True:
            if pending:
                pending = _Round(self._remote, self._open(pending), self._final_dir).run(report)
            report()
            if not pending:
                return
            if max(self._journal.times_forgotten(file.name) for file in pending) > 1:
                names = ", ".join(file.name for file in pending)
                raise SourceError(
                    "verification",
                    f"{self._remote.where}: {names} arrived twice with another content than the source's "
                    "own digest promises. Something between here and there alters it: try another network "
                    "or mirror, or report it to the source.",
                )

    def _in_place(self, file: RemoteFile) -> bool:
        try:
            return (self._final_dir / file.name).stat().st_size == file.size
        except FileNotFoundError:
            return False

    def _open(self, files: Sequence[RemoteFile]) -> list[PartialFile]:
        return [PartialFile(file, self._partial_dir, self._journal) for file in files]


class _Round:
    """One pass over files: reading threads fill them, verifying threads follow."""

    def __init__(self, remote: Remote, files: list[PartialFile], final_dir: Path) -> None:
        self._remote = remote
        self._files = files
        self._final_dir = final_dir
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._ranges = _Ranges(files, remote.connections)
        # What each reading thread receives now, and when it last heard something.
        self._heard: dict[int, tuple[Body, float]] = {}
        self._unverified = deque(files)
        self._mismatched: list[RemoteFile] = []

    def run(self, report: Callable[[], None]) -> list[RemoteFile]:
        """Fill and verify all files; those that failed verification are returned, forgotten."""
        readers = [self._read_ranges] * self._ranges.connections
        verifiers = [self._verify_files] * min(FILES_AT_ONCE, len(self._files))
        threads = [
            threading.Thread(target=self._guarded, args=(w,), daemon=True) for w in readers + verifiers
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    report()
                    if not self._ranges:
                        self._hang_up(silent_s=SILENT_S)
                    thread.join(_REPORT_S)
        finally:
            # No thread may still write once the entry's lock is let go.
            self._stop.set()
            self._hang_up(silent_s=0)
            for thread in threads:
                thread.join()
            for file in self._files:
                file.close()
        if self._error is not None:
            raise self._error
        return self._mismatched

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Stopped:
            pass
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
            self._stop.set()

    def _hang_up(self, silent_s: float) -> None:
        """Close the connections over which nothing has come for so long; their readers take new ones."""
        now = time.monotonic()
        for body, heard in list(self._heard.values()):
            if now - heard >= silent_s:
                body.hang_up()

    def _verify_files(self) -> None:
        if sys.platform == "linux":
            # Of this thread alone: hashing is for the processors that landing the bytes leaves idle.
            os.setpriority(os.PRIO_PROCESS, 0, _VERIFYING_NICENESS)
        while True:
            with self._lock:
                if not self._unverified:
                    return
                file = self._unverified.popleft()
            if file.matches(self._stop):
                file.path.rename(self._final_dir / file.file.name)
            else:
                file.forget()
                with self._lock:
                    self._mismatched.append(file.file)

    def _read_ranges(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                if not self._ranges:
                    return
                file, start, end = self._ranges.take()
            try:
                self._read(file, start, end)
            except _RangesIgnored:
                with file.whole:
                    self._read(file, 0, file.file.size, whole=True)

    def _read(self, file: PartialFile, start: int, end: int, whole: bool = False) -> None:
        tries = 0
        while missing := file.missing(start, end):
            before = file.bytes_done
            try:
                wanted = missing[0][0]
                with self._remote.open_range(file.file, wanted, end) as reply:
                    if reply.offset < wanted and not whole:
                        raise _RangesIgnored
                    if reply.offset > wanted:
                        raise Transient(f"bytes from {reply.offset} on came, {wanted} was asked for")
                    self._receive(file, reply, end)
            except Transient as problem:
                tries = 1 if file.bytes_done > before else tries + 1
                if tries >= retry.MAX_FRUITLESS_TRIES:
                    raise SourceError(
                        "network",
                        f"{self._remote.where}: {file.file.name} stopped coming after {tries} tries in a row "
                        f"({problem}). Check the network and start again: it continues where it stopped.",
                    ) from problem
                if self._stop.wait(retry.delay_s(tries, problem.retry_after)):
                    raise Stopped from None

    def _receive(self, file: PartialFile, reply: RangeReply, end: int) -> None:
        if reply.total is not None and reply.total != file.file.size:
            raise SourceError(
                "verification",
                f"{self._remote.where}: {file.file.name} has {reply.total} bytes, but was listed with "
                f"{file.file.size}. It changed, or a proxy answers in its place; start again.",
            )
        position = reply.offset
        me = threading.get_ident()
        try:
            while position < end:
                self._heard[me] = reply.body, time.monotonic()
                if self._stop.is_set():
                    raise Stopped
                block_end = min(end, position // BLOCK_BYTES * BLOCK_BYTES + BLOCK_BYTES)
                moved = file.take(reply.body, position, block_end - position)
                if not moved:
                    raise Transient("the connection was closed early")
                position += moved
        finally:
            self._heard.pop(me, None)
