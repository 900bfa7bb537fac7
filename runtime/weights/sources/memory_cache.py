"""A cache that is in memory and not on a disk: it lives as long as the process that asked for it."""

from __future__ import annotations

import atexit
import fcntl
import functools
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from runtime.weights.sources.errors import SourceError

_MEMORY = Path("/dev/shm")
_PREFIX = "firstlight-"
# Locked as long as its process lives, however that ends.
_ALIVE = "alive"
_held: list[int] = []


@functools.cache
def memory_cache_dir() -> Path:
    """This process's folder in memory, deleted when it ends; what killed ones left is deleted now.

    Raises SourceError (kind "read_only") where there is no file system in memory.
    """
    try:
        _sweep()
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_MEMORY))
        descriptor = os.open(folder / _ALIVE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        raise SourceError(
            "read_only",
            f"--no-cache keeps the model in {_MEMORY}, which cannot be used: {error.strerror}. Mount a tmpfs "
            "there, or leave the flag out and choose a folder with --download-dir.",
        ) from error
    _held.append(descriptor)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _sweep() -> None:
    for folder in _MEMORY.glob(_PREFIX + "*"):
        with suppress(OSError), open(folder / _ALIVE) as alive:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
