"""The cache of models: where an entry lies, when it is complete, who may write it.

    <cache_dir>/models/<kind>--<name>/<version>/              the files of one version of one model
    <cache_dir>/models/<kind>--<name>/<version>.partial/      what an unfinished download has so far
    <cache_dir>/models/<kind>--<name>/<version>.lock          held while someone writes the entry
    <cache_dir>/models/<kind>--<name>/refs/<ref>              the version that a ref last stood for

Only whole, verified files ever enter an entry's directory, and its marker is renamed into place last:
the entry is published when the marker is there. The directory's path never changes, so a tokenizer may
be loaded from it while the weights still come.

Nobody waits for a disk meanwhile, so what was verified may still be in memory only. The marker holds good
until the machine goes down, and from `persist` on for longer.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import msgspec

from runtime.weights.sources.boot import boot_id
from runtime.weights.sources.errors import SourceError

_MARKER = ".firstlight.json"
_POLL_S = 0.2
# What a directory answers that cannot serve as a cache: not writable, not a directory, on a file system
# without locks, or on a disk or network share that fails.
_UNUSABLE = {
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT),
    *(errno.ENOLCK, errno.ENOTSUP, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE),
}


def default_cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where models are kept unless somebody says otherwise; below /tmp where there is no home folder."""
    base = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME") or "/tmp", ".cache")
    return Path(base, "firstlight")


class Marker(msgspec.Struct):
    """What a published entry holds: its source and each file's size in bytes.

    `boot_id` is that of the machine while it is the only one that is known to have the files' content.
    """

    source: str
    files: dict[str, int]
    boot_id: str = ""

    @property
    def is_doubtful(self) -> bool:
        """Whether the machine went down since, maybe before its disk had it all."""
        return self.boot_id not in ("", boot_id())


class Entry:
    """One version of one model in the cache. `name` and `version` must be valid file names."""

    def __init__(self, cache_dir: Path, kind: str, name: str, version: str) -> None:
        self.model_dir = model_dir(cache_dir, kind, name)
        self.directory = self.model_dir / version
        self.partial = partial_dir(self.directory)
        self._lock = self.model_dir / (version + ".lock")

    def complete(self) -> bool:
        """Whether the entry is published and its files still have the sizes they were published with."""
        marker = _read_marker(self.directory)
        if marker is None or marker.is_doubtful:
            return False
        try:
            return all((self.directory / name).stat().st_size == size for name, size in marker.files.items())
        except OSError:
            return False

    @property
    def is_doubtful(self) -> bool:
        """Whether the entry was published, and the machine went down after that."""
        marker = _read_marker(self.directory)
        return marker is not None and marker.is_doubtful

    def publish(self, source: str, files: Mapping[str, int], directory: Path | None = None) -> None:
        """Mark the entry as complete; `directory` (default: the entry's own) becomes the entry's."""
        directory = directory or self.directory
        _write_marker(directory, Marker(source, dict(files), boot_id()))
        if directory != self.directory:
            shutil.rmtree(self.directory, ignore_errors=True)
            directory.rename(self.directory)
        shutil.rmtree(self.partial, ignore_errors=True)

    def sweep(self) -> None:
        """Delete what unfinished downloads of other versions left, unless one is under way."""
        for partial in self.model_dir.glob("*.partial"):
            if partial == self.partial:
                continue
            other = partial.with_suffix("")
            with suppress(OSError), open(self.model_dir / (other.name + ".lock"), "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not (other / _MARKER).exists():
                    shutil.rmtree(other, ignore_errors=True)
                shutil.rmtree(partial, ignore_errors=True)

    @contextmanager
    def locked(self, on_wait: Callable[[], None]) -> Iterator[int]:
        """Hold the entry's lock; while another process holds it, call `on_wait` several times a second.

        Gives the lock's file descriptor. The kernel lets go of the lock when the process ends, however
        it ends. The lock's file stays: deleting it would let two processes lock two different files.
        """
        self.model_dir.mkdir(parents=True, exist_ok=True)
        with open(self._lock, "a") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    on_wait()
                    time.sleep(_POLL_S)
            yield lock.fileno()


def persist(directory: Path) -> None:
    """Wait until a published entry's files are on the disk itself, and note that in its marker.

    Does nothing in a directory that has no marker or cannot be written.
    """
    marker = _read_marker(directory)
    if marker is None or not marker.boot_id:
        return
    with suppress(OSError):
        for path in (*(directory / name for name in marker.files), directory):
            _sync(path)
        marker.boot_id = ""
        _write_marker(directory, marker)
        _sync(directory)


def persist_meanwhile(directory: Path) -> None:
    """`persist` in a thread, which nobody waits for: if this process ends before, the next one does it."""
    threading.Thread(target=persist, args=(directory,), name="persist", daemon=True).start()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_marker(directory: Path) -> Marker | None:
    try:
        return msgspec.json.decode((directory / _MARKER).read_bytes(), type=Marker)
    except (OSError, msgspec.DecodeError):
        return None


def _write_marker(directory: Path, marker: Marker) -> None:
    temporary = directory / f"{_MARKER}.{os.getpid()}.new"
    temporary.write_bytes(msgspec.json.encode(marker))
    temporary.replace(directory / _MARKER)


def model_dir(cache_dir: Path, kind: str, name: str) -> Path:
    """The folder of all versions of one model."""
    return cache_dir / "models" / f"{kind}--{name}"


def partial_dir(directory: Path) -> Path:
    """Where what has come so far of an entry's directory lies."""
    return directory.with_name(directory.name + ".partial")


def remember(directory: Path, ref: str, version: str) -> None:
    """Note in a model's folder which version a ref (a branch, `latest`) stands for now."""
    if recall(directory, ref) == version:
        return
    refs = directory / "refs"
    refs.mkdir(parents=True, exist_ok=True)
    temporary = refs / f".{os.getpid()}.new"
    temporary.write_text(version)
    temporary.replace(refs / quote(ref, safe=""))


def recall(directory: Path, ref: str) -> str | None:
    """The version that a ref stood for when it was last fetched; None if it never was."""
    try:
        return (directory / "refs" / quote(ref, safe="")).read_text()
    except OSError:
        return None


def require_space(directory: Path, needed: int) -> None:
    """Raise SourceError (kind "no_space") unless `needed` more bytes fit on the directory's disk."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise SourceError(
            "no_space",
            f"Not enough space in {directory}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are "
            "free. Free some space, choose another disk with --download-dir, or, on a machine with memory "
            "enough, start with --no-cache.",
        )


@contextmanager
def explained(directory: Path) -> Iterator[None]:
    """Turn the operating system's errors about the cache into SourceErrors for people."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SourceError(
                "no_space",
                f"The disk of {directory} is full ({error.strerror}). Free some space, choose another disk "
                "with --download-dir, or start with --no-cache; the download continues where it stopped.",
            ) from error
        if error.errno in _UNUSABLE:
            raise SourceError(
                "read_only",
                f"The cache directory {directory} cannot be used: {error.strerror}"
                f"{f' ({error.filename})' if error.filename else ''}. "
                "Make it writable, choose another with --download-dir, or start with --no-cache to keep the "
                "model in memory.",
            ) from error
        raise
