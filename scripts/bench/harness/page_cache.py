"""Whether files lie in the page cache, and how to bring them there or get them out."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness import BenchError

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_READ_BYTES = 16 << 20
_READERS = 16
_LARGEST = "libtorch_"


def resident(files: Sequence[Path]) -> float:
    """The share of the files' pages that the page cache holds (mincore)."""
    held = pages = 0
    for file in files:
        size = file.stat().st_size
        if size == 0:
            continue
        with open(file, "rb") as data, mmap.mmap(data.fileno(), size, access=mmap.ACCESS_COPY) as mapping:
            states = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
            start = ctypes.c_char.from_buffer(mapping)
            failed = _LIBC.mincore(ctypes.addressof(start), size, states)
            del start  # the mapping cannot be closed while anything points into it
            if failed:
                raise BenchError(f"mincore of {file}: {os.strerror(ctypes.get_errno())}")
        held += sum(state & 1 for state in states.raw)
        pages += len(states.raw)
    return held / pages if pages else 1.0


def evict(files: Sequence[Path]) -> None:
    """Get the files out of the page cache. Raises BenchError if they are still there afterwards."""
    _drop(files)
    if resident(files) > 0 and os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    left = resident(files)
    if left > 0:
        raise BenchError(
            f"{left:.0%} of {files[0].parent} stays in the page cache: another process has it mapped, "
            "or its file system has no other place for it"
        )


def evict_code() -> None:
    """Get everything out that a start of a Python with torch reads, but for what this process itself uses.

    Raises BenchError if torch's libraries are still there afterwards.
    """
    installed = sysconfig.get_paths()
    folders = {*sys.path, *installed.values(), sys.pycache_prefix}
    files = {
        Path(folder, name)
        for root in folders
        if root and Path(root).is_dir()
        for folder, _, names in os.walk(root)
        for name in names
        if name.endswith((".py", ".pyc")) or ".so" in name
    }
    _drop(file for file in files if file.is_file())
    evict([file for file in files if file.name.startswith(_LARGEST)])


def _drop(files: Iterable[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that are not on the disk yet cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read(files: Sequence[Path]) -> float:
    """Read all of the files, with many large reads at once; returns the seconds that it took."""
    work = [(file, offset) for file in files for offset in range(0, file.stat().st_size, _READ_BYTES)]
    work.reverse()
    descriptors = {file: os.open(file, os.O_RDONLY) for file in files}

    def reader() -> None:
        buffer = mmap.mmap(-1, _READ_BYTES)
        view = memoryview(buffer)
        while work:
            try:
                file, offset = work.pop()
            except IndexError:
                return  # another reader was quicker
            os.preadv(descriptors[file], [view], offset)

    threads = [threading.Thread(target=reader) for _ in range(_READERS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    for descriptor in descriptors.values():
        os.close(descriptor)
    return took
