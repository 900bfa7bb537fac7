"""Runs a plan on a GPU: all of a rank's weights into one arena, as fast as the slowest wire between.

Several threads read the files' ranges straight into small pinned buffers and copy from there, two
buffers each, so that reading and copying overlap. The driver is called directly: none of this needs
torch, which is imported meanwhile. Pinning is slow, so the model itself is never pinned on the way.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.model.layout import RowRange
from runtime.weights.checkpoint import CheckpointError
from runtime.weights.cuda_driver import Driver
from runtime.weights.gate import OPEN, Gate
from runtime.weights.plan import Piece, Plan, PlannedParameter

if TYPE_CHECKING:
    import torch

# Readers and torch's import share Python's lock, so what counts is when both are through. Measured beside
# an H200 with 16 GB: 12 readers of 8 MiB end at 2.0 s but hold the import up until 2.9 s; 6 of 16 MiB end
# at 2.4 s, as the import does; 4 of 32 MiB end at 2.7 s, the import at 2.4 s.
NUM_READERS = 6
BUFFER_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of a file that fits a buffer, and where in the arena it goes.

    Of each `pitch` bytes of the run, `width` from `skip` on are copied; usually that is all of them.
    """

    file: Path
    start: int
    num_bytes: int
    target: int
    skip: int
    width: int
    pitch: int


def chunks_of(plan: Plan, buffer_bytes: int = BUFFER_BYTES) -> Iterator[Chunk]:
    """Cut everything that the plan reads into chunks, in the order of the plan."""
    for parameter in plan.parameters:
        offset = parameter.offset
        for piece in parameter.pieces:
            share = piece.num_bytes // max(1, piece.shape[0])
            for rows in piece.rows:
                yield from _chunks(piece, rows, offset, buffer_bytes)
                offset += (rows[1] - rows[0]) * share


def _chunks(piece: Piece, rows: RowRange, offset: int, buffer_bytes: int) -> Iterator[Chunk]:
    tensor, (first, last) = piece.tensor, rows
    row_bytes = (tensor.stop - tensor.start) // max(1, tensor.shape[0]) if tensor.shape else tensor.item_bytes
    start, stop = tensor.start + first * row_bytes, tensor.start + last * row_bytes
    skip, width = 0, row_bytes
    if len(tensor.shape) > 1:
        skip, width = (
            piece.columns[0] * tensor.item_bytes,
            (piece.columns[1] - piece.columns[0]) * tensor.item_bytes,
        )
    if width == row_bytes:
        # Whole rows lie close together in the file: where they are cut does not matter.
        for at in range(start, stop, buffer_bytes):
            size = min(buffer_bytes, stop - at)
            yield Chunk(tensor.file, at, size, offset + at - start, 0, size, size)
        return
    step = max(1, buffer_bytes // row_bytes)
    for row in range(0, last - first, step):
        count = min(step, last - first - row)
        yield Chunk(
            tensor.file,
            start + row * row_bytes,
            count * row_bytes,
            offset + row * width,
            skip,
            width,
            row_bytes,
        )


class DeviceWeights:
    """The plan's weights in one arena on the device. Constructing allocates it; `load` fills it."""

    def __init__(self, plan: Plan, driver: Driver, gate: Gate = OPEN) -> None:
        self.plan = plan
        self._driver = driver
        self._gate = gate
        self.address = driver.allocate(max(1, plan.arena_bytes))
        self._chunks: Iterator[Chunk] = iter(())
        self._lock = threading.Lock()
        self._done = 0
        self._error: Exception | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes that are read from files."""
        return self.plan.read_bytes

    def load(self, on_progress: Callable[[int], None]) -> None:
        """Fill the arena; returns when every byte is on the device. May be called again.

        `on_progress` is told the bytes done so far. Raises `CheckpointError`, `CudaError`, and what the
        gate raises.
        """
        self._done, self._error = 0, None
        # The sort keeps the plan's order of what has the same turn.
        due = sorted(chunks_of(self.plan), key=lambda chunk: self._gate.turn(chunk.file, chunk.start))
        self._chunks = iter(due)
        readers = [
            threading.Thread(target=self._read, args=(on_progress,), name=f"upload-{n}", daemon=True)
            for n in range(NUM_READERS)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        if self._error is not None:
            raise self._error

    def _read(self, on_progress: Callable[[int], None]) -> None:
        try:
            self._driver.enter()
            ring = _Ring(self._driver)
            files: dict[Path, int] = {}
            try:
                while (chunk := self._next()) is not None:
                    if chunk.file not in files:
                        files[chunk.file] = self._gate.open(chunk.file)
                    self._gate.wait(chunk.file, chunk.start, chunk.start + chunk.num_bytes)
                    ring.send(files[chunk.file], chunk, self.address)
                    with self._lock:
                        self._done += chunk.num_bytes
                        on_progress(self._done)
            finally:
                ring.close()
                for descriptor in files.values():
                    os.close(descriptor)
        except Exception as error:  # `load` raises it in the caller's thread
            self._error = error

    def _next(self) -> Chunk | None:
        with self._lock:
            return None if self._error is not None else next(self._chunks, None)

    def close(self) -> None:
        """Give the arena back; no view of it may be used any more."""
        self._driver.free(self.address)

    def tensors(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """Each parameter as one view of the arena, or as one for each piece, in the checkpoint's dtype."""
        import torch

        arena = torch.as_tensor(_Adopted(self.address, max(1, self.plan.arena_bytes)), device="cuda")
        return {parameter.name: tuple(_views(arena, parameter)) for parameter in self.plan.parameters}


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
            raise CheckpointError(
                f"{chunk.file} ends before byte {chunk.start + chunk.num_bytes}: it was cut short."
            )
        done += count


class _Adopted:
    """Device memory as torch takes it over: https://numba.readthedocs.io, "CUDA Array Interface"."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None,
        }  # fmt: skip


def _views(arena: torch.Tensor, parameter: PlannedParameter) -> Iterator[torch.Tensor]:
    import torch

    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32}
    offset = parameter.offset
    for pieces in [parameter.pieces] if parameter.stacked else [(piece,) for piece in parameter.pieces]:
        size = sum(piece.num_bytes for piece in pieces)
        flat = arena[offset : offset + size].view(dtypes[pieces[0].tensor.dtype])
        yield flat if len(pieces[0].shape) == 1 else flat.view(-1, pieces[0].shape[1])
        offset += size
