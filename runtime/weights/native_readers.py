"""Readers in C, `native/readers.c`, which need Python's lock only to be started, fed and asked.

python -m runtime.weights.native_readers          build them ahead of time, for this machine
python -m runtime.weights.native_readers image    build them next to `native/`, for an image
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterable
from ctypes import byref, c_char_p, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path

from runtime.compiled import CannotCompile, Library
from runtime.weights.chunks import Chunk
from runtime.weights.cuda_driver import Driver
from runtime.weights.gate import OPEN, Gate
from runtime.weights.readers import cut_short

# Chunks are what readers are fed with; they read and copy them in pieces that fit their buffers.
CHUNK_BYTES = 64 << 20
# Measured with 16 GB in the page cache beside an H100: 47 GB/s, buffers included; 8 readers, and 16, 46.
# Buffers of 8 MiB no longer fit the processor's cache along with the rest (33 GB/s), and take longer to pin.
_NUM_READERS = 12
_BUFFER_BYTES = 4 << 20
_POLL_MS = 50

_LIBRARY = Library(
    "readers",
    Path(__file__).with_name("native"),
    flags=("-std=gnu11", "-O2", "-fPIC", "-fvisibility=hidden"),
    link=("-shared", "-pthread", "-ldl"),
)
_READING, _FAILED = 0, 2
_DRIVER, _SHORT = 0, 2


class _Run(ctypes.Structure):
    """`run_t`."""

    _fields_ = [
        ("file", c_int64), ("start", c_int64), ("num_bytes", c_int64), ("target", c_uint64),
        ("skip", c_int64), ("width", c_int64), ("pitch", c_int64),
    ]  # fmt: skip


class _Failure(ctypes.Structure):
    """`failure_t`."""

    _fields_ = [("kind", c_int), ("code", c_int), ("call", c_char_p), ("run", c_int64)]


def build() -> Path | None:
    """The library: built earlier, or shipped with an image, or compiled now; None without a compiler."""
    if os.environ.get("FIRSTLIGHT_READERS") == "python" or sys.platform != "linux":
        return None
    for path in (_LIBRARY.shipped("any"), cached := _LIBRARY.cached("any")):
        if path.exists():
            return path
    try:
        _LIBRARY.compile(cached)
    except CannotCompile as error:
        print(f"firstlight: {error}; weights are read by slower threads", file=sys.stderr)
        return None
    return cached


@functools.cache
def library() -> ctypes.CDLL | None:
    """The readers, or None where they cannot be built."""
    path = build()
    if path is None:
        return None
    loaded = ctypes.CDLL(str(path))
    loaded.readers_start.argtypes = [c_void_p, c_int, c_int64]
    loaded.readers_start.restype = c_void_p
    loaded.readers_add.argtypes = [c_void_p, c_void_p, c_int64]
    loaded.readers_close.argtypes = [c_void_p]
    loaded.readers_wait.argtypes = [c_void_p, c_int, c_void_p]
    loaded.readers_end.argtypes = [c_void_p, c_void_p]
    return loaded


class NativeReaders:
    """Threads in C with their buffers, started before there is anything to read."""

    def __init__(self, driver: Driver, lib: ctypes.CDLL) -> None:
        self._driver = driver
        self._lib = lib
        self._readers = lib.readers_start(driver.context, _NUM_READERS, _BUFFER_BYTES)
        if self._readers is None:
            raise MemoryError("The threads that read weights could not be started.")

    def upload(
        self, chunks: Iterable[Chunk], arena: int, gate: Gate, on_progress: Callable[[int], None]
    ) -> None:
        """Bring chunks to the device; see `readers.upload`. The readers end with it."""
        failure, added, files = _Failure(), list[Chunk](), dict[Path, int]()
        # Of files that are all there nothing has to be waited for, not even for Python's lock.
        portions = [list(chunks)] if gate is OPEN else ([chunk] for chunk in chunks)
        try:
            for portion in portions:
                for chunk in portion:
                    if chunk.file not in files:
                        files[chunk.file] = gate.open(chunk.file)
                    gate.wait(chunk.file, chunk.start, chunk.start + chunk.num_bytes)
                if self._state(0, on_progress) == _FAILED:
                    break
                self._add(files, portion, arena)
                added += portion
            self._lib.readers_close(self._readers)
            while self._state(_POLL_MS, on_progress) == _READING:
                pass
        finally:
            self._lib.readers_end(self._readers, byref(failure))
            for descriptor in files.values():
                os.close(descriptor)
        self._check(failure, added)

    def _add(self, files: dict[Path, int], chunks: list[Chunk], arena: int) -> None:
        runs = (_Run * len(chunks))(*(
            _Run(
                files[chunk.file], chunk.start, chunk.num_bytes, arena + chunk.target,
                chunk.skip, chunk.width, chunk.pitch,
            )
            for chunk in chunks
        ))  # fmt: skip
        if self._lib.readers_add(self._readers, runs, len(chunks)):
            raise MemoryError("There is no memory for the list of what to read.")

    def _state(self, milliseconds: int, on_progress: Callable[[int], None]) -> int:
        done = c_int64()
        state: int = self._lib.readers_wait(self._readers, milliseconds, byref(done))
        on_progress(done.value)
        return state

    def _check(self, failure: _Failure, added: list[Chunk]) -> None:
        if not failure.call:
            return
        if failure.kind == _DRIVER:
            raise self._driver.error(failure.call.decode(), failure.code)
        chunk = added[failure.run]
        if failure.kind == _SHORT:
            raise cut_short(chunk)
        raise OSError(failure.code, os.strerror(failure.code), str(chunk.file))


if __name__ == "__main__":
    if sys.argv[1:] == ["image"]:
        _LIBRARY.compile(_LIBRARY.shipped("any"))
        print(_LIBRARY.shipped("any"))
    else:
        print(build())
