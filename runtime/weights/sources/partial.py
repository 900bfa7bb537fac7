"""A file that is coming: its bytes on the disk, and its verification, which follows them."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.weights.sources.journal import Journal
from runtime.weights.sources.remote import RemoteFile

if TYPE_CHECKING:
    from runtime.weights.sources.mover import Body

# So much is hashed without asking for Python's lock, which those who receive the bytes need more.
_HASH_BYTES = 64 << 20
_POLL_S = 0.01
_MADV_POPULATE_READ = 22  # Linux 5.14


class Stopped(Exception):
    """The download was given up; whoever sees this just ends."""


class PartialFile:
    """One file of a download: its bytes on the disk and the record of which are there.

    Safe to use from many threads. Written bytes are recorded in the journal after they are written.
    """

    def __init__(self, file: RemoteFile, directory: Path, journal: Journal) -> None:
        self.file = file
        self.path = directory / file.name
        # Held by the one thread that reads the whole file where the server knows no ranges.
        self.whole = threading.Lock()
        self._journal = journal
        self._lock = threading.Lock()
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if os.fstat(self._fd).st_size != file.size:
            # A file of another length than recorded: what the journal says of it cannot be relied on.
            if journal.done(file.name).total and os.fstat(self._fd).st_size < file.size:
                journal.forget(file.name)
            os.ftruncate(self._fd, file.size)
        self._done = journal.done(file.name)

    def close(self) -> None:
        """Close the file's descriptor."""
        os.close(self._fd)

    @property
    def complete(self) -> bool:
        """Whether every byte is on the disk."""
        with self._lock:
            return self._done.total == self.file.size

    @property
    def bytes_done(self) -> int:
        """How many bytes are on the disk."""
        with self._lock:
            return self._done.total

    def missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """The ranges within [start, end) that are not on the disk."""
        with self._lock:
            return self._done.missing(start, end)

    def take(self, body: Body, offset: int, count: int) -> int:
        """Put at most `count` of the body's next bytes in their place and record them; how many."""
        moved = body.move(self._fd, offset, count)
        if moved:
            self._journal.append(self.file.name, offset, moved)
            with self._lock:
                self._done.add(offset, offset + moved)
        return moved

    def forget(self) -> None:
        """Treat the whole file as missing. What comes instead goes into a new file, so that who has this
        one open for reading can tell.
        """
        with self._lock:
            self.path.unlink()
            self._journal.forget(self.file.name)
            self._done = self._journal.done(self.file.name)

    def matches(self, stop: threading.Event) -> bool:
        """Wait until the file is complete, hashing it as it comes; whether it is what was listed.

        A file that the source gives no digest of matches when it is complete. Raises Stopped when
        `stop` is set first.
        """
        digest, expected = _digest(self.file)
        if not self.file.size:
            return expected is None or digest.hexdigest() == expected
        with (
            mmap.mmap(self._fd, self.file.size, prot=mmap.PROT_READ) as mapped,
            memoryview(mapped) as content,
        ):
            position = 0
            while position < self.file.size:
                end = self._wait_beyond(position, stop)
                while expected is not None and position < end:
                    piece = min(_HASH_BYTES, end - position)
                    _bring_in(mapped, position, piece)
                    with content[position : position + piece] as part:
                        digest.update(part)
                    position += piece
                position = end
        return expected is None or digest.hexdigest() == expected

    def _wait_beyond(self, position: int, stop: threading.Event) -> int:
        # Not woken for every block: there are thousands a second, and who wakes wants Python's lock.
        while True:
            with self._lock:
                end = self._done.end_of_run(position)
            if end > position:
                return end
            if stop.wait(_POLL_S):
                raise Stopped


def _bring_in(mapped: mmap.mmap, start: int, count: int) -> None:
    """Have these bytes in memory. Raises OSError if the disk cannot give them, else the process would end."""
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    try:
        mapped.madvise(_MADV_POPULATE_READ, first, start + count - first)
    except OSError as error:
        if error.errno != errno.EINVAL:  # older kernels do not know it
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error


def _digest(file: RemoteFile) -> tuple[hashlib._Hash, str | None]:
    if file.sha256 is not None:
        return hashlib.sha256(), file.sha256
    # Git names a blob by the digest of its content with this header; it guards no secret here.
    digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    return digest, file.git_sha1
