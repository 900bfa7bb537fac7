"""Readers that are Python threads: what `native_readers` does in C, for machines without a compiler.

Each reads into two pinned buffers in turn and copies from there, so that reading and copying overlap. They
need Python's lock between two calls, and torch's import holds it, so that both take longer.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from runtime.weights.checkpoint import CheckpointError
from runtime.weights.chunks import Chunk
from runtime.weights.cuda_driver import Driver
from runtime.weights.gate import Gate

# What counts is when both are through. Measured beside an H200 with 16 GB: 12 readers of 8 MiB end at 2.0 s
# but hold the import up until 2.9 s; 6 of 16 MiB end at 2.4 s, as the import does; 4 of 32 MiB end at
# 2.7 s, the import at 2.4 s.
NUM_READERS = 6
BUFFER_BYTES = 16 << 20


def upload(
    chunks: Iterable[Chunk], arena: int, driver: Driver, gate: Gate, on_progress: Callable[[int], None]
) -> None:
    """Bring chunks of at most `BUFFER_BYTES` to the device, `arena` being where their targets count from.

    Returns when every byte is there. `on_progress` is told the bytes done so far. Raises
    `CheckpointError`, `CudaError`, and what the gate raises.
    """
    readers = _Readers(iter(chunks), arena, driver, gate, on_progress)
    threads = [
        threading.Thread(target=readers.read, name=f"upload-{n}", daemon=True) for n in range(NUM_READERS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if readers.error is not None:
        raise readers.error


class _Readers:
    """What the threads share: the chunks that are left, and how far they are."""

    def __init__(
        self,
        chunks: Iterator[Chunk],
        arena: int,
        driver: Driver,
        gate: Gate,
        on_progress: Callable[[int], None],
    ) -> None:
        self._chunks = chunks
        self._arena = arena
        self._driver = driver
        self._gate = gate
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._done = 0
        self.error: Exception | None = None

    def read(self) -> None:
        """The work of one thread."""
        try:
            self._driver.enter()
            ring = _Ring(self._driver)
            files: dict[Path, int] = {}
            try:
                while (chunk := self._next()) is not None:
                    if chunk.file not in files:
                        files[chunk.file] = self._gate.open(chunk.file)
                    self._gate.wait(chunk.file, chunk.start, chunk.start + chunk.num_bytes)
                    ring.send(files[chunk.file], chunk, self._arena)
                    with self._lock:
                        self._done += chunk.num_bytes
                        self._on_progress(self._done)
            finally:
                ring.close()
                for descriptor in files.values():
                    os.close(descriptor)
        except Exception as error:  # `upload` raises it in its caller's thread
            self.error = error

    def _next(self) -> Chunk | None:
        with self._lock:
            return None if self.error is not None else next(self._chunks, None)


class _Ring:
    """One reader's buffers, its stream, and what tells when a buffer is free again."""

    def __init__(self, driver: Driver, num_buffers: int = 2) -> None:
        self._driver = driver
        self._stream = driver.stream()
        self._addresses = [driver.allocate_pinned(BUFFER_BYTES) for _ in range(num_buffers)]
        self._views = [
            memoryview((ctypes.c_char * BUFFER_BYTES).from_address(address)).cast("B")
            for address in self._addresses
        ]
        self._free = [driver.event() for _ in range(num_buffers)]
        self._turn = 0

    def send(self, descriptor: int, chunk: Chunk, arena: int) -> None:
        """Read a chunk and begin to copy it."""
        turn = self._turn
        self._turn = (turn + 1) % len(self._addresses)
        self._driver.wait(self._free[turn])
        _read_fully(descriptor, self._views[turn], chunk)
        source, target = self._addresses[turn] + chunk.skip, arena + chunk.target
        if chunk.width == chunk.pitch:
            self._driver.copy(target, source, chunk.num_bytes, self._stream)
        else:
            rows = chunk.num_bytes // chunk.pitch
            self._driver.copy_rows(target, source, chunk.width, rows, chunk.pitch, self._stream)
        self._driver.record(self._free[turn], self._stream)

    def close(self) -> None:
        """Wait for the copies and give the buffers back."""
        for event, address in zip(self._free, self._addresses, strict=True):
            self._driver.wait(event)
            self._driver.free_pinned(address)


def _read_fully(descriptor: int, buffer: memoryview, chunk: Chunk) -> None:
    done = 0
    while done < chunk.num_bytes:
        count = os.preadv(descriptor, [buffer[done : chunk.num_bytes]], chunk.start + done)
        if count == 0:
            raise cut_short(chunk)
        done += count


def cut_short(chunk: Chunk) -> CheckpointError:
    """The error for a file that ends before its chunk does."""
    return CheckpointError(
        f"{chunk.file} ends before byte {chunk.start + chunk.num_bytes}: it was cut short."
    )
