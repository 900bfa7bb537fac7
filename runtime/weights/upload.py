"""Runs a plan on a GPU: all of a rank's weights into one arena, as fast as the slowest wire between.

Several readers read the files' ranges straight into small pinned buffers and copy from there. The driver
is called directly: none of this needs torch, which is imported meanwhile. Pinning is slow, so the model
itself is never pinned on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from runtime.weights import native_readers, readers
from runtime.weights.chunks import chunks_of
from runtime.weights.cuda_driver import Driver
from runtime.weights.gate import OPEN, Gate
from runtime.weights.loaded_files import Stamp, stamps
from runtime.weights.native_readers import NativeReaders
from runtime.weights.plan import Plan, PlannedParameter
from runtime.weights.virtual_memory import VirtualMemory

if TYPE_CHECKING:
    from pathlib import Path

    import torch


class DeviceWeights:
    """The plan's weights in one arena on the device. Constructing allocates it; `load` fills it.

    `gate` is what it reads through; it may be changed between two loads.
    """

    def __init__(self, plan: Plan, driver: Driver, gate: Gate = OPEN) -> None:
        self.plan = plan
        self._driver = driver
        self.gate = gate
        self.memory = VirtualMemory(driver, max(1, plan.arena_bytes))
        self.address = self.memory.address
        # Those of the files that the arena was filled from.
        self.stamps: dict[Path, Stamp] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes that are read from files."""
        return self.plan.file_bytes

    def load(self, on_progress: Callable[[int], None]) -> None:
        """Fill the arena; returns when every byte is on the device. May be called again.

        `on_progress` is told the bytes done so far. Raises `CheckpointError`, `CudaError`, and what the
        gate raises.
        """
        library = native_readers.library()
        most = readers.BUFFER_BYTES if library is None else native_readers.CHUNK_BYTES
        # The sort keeps the plan's order of what has the same turn.
        due = sorted(chunks_of(self.plan, most), key=lambda chunk: self.gate.turn(chunk.file, chunk.start))
        # Of files that are all there, who changes one from here on makes it another one than was loaded.
        before = stamps(self.plan.files, OPEN) if self.gate is OPEN else None
        if library is None:
            readers.upload(due, self.address, self._driver, self.gate, on_progress)
        else:
            NativeReaders(self._driver, library).upload(due, self.address, self.gate, on_progress)
        self.stamps = stamps(self.plan.files, self.gate) if before is None else before

    def close(self) -> None:
        """Give the arena back; no view of it may be used any more."""
        self.memory.close()

    def tensors(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """Each parameter as one view of the arena, or as one for each piece, in the checkpoint's dtype."""
        from runtime.kernels.adopted import adopted

        arena = adopted(self.address, max(1, self.plan.arena_bytes))
        return {parameter.name: tuple(_views(arena, parameter)) for parameter in self.plan.parameters}


def _views(arena: torch.Tensor, parameter: PlannedParameter) -> Iterator[torch.Tensor]:
    import torch

    dtypes = {
        "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32,
        "F8_E4M3": torch.float8_e4m3fn,
    }  # fmt: skip
    offset = parameter.offset
    for pieces in [parameter.pieces] if parameter.stacked else [(piece,) for piece in parameter.pieces]:
        size = sum(piece.num_bytes for piece in pieces)
        flat = arena[offset : offset + size].view(dtypes[pieces[0].tensor.dtype])
        yield flat if len(pieces[0].shape) == 1 else flat.view(-1, pieces[0].shape[1])
        offset += size
