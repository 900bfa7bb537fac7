"""Runs a plan on the CPU: the files are mapped, and parameters are views of the mapped bytes.

Mapping and reading ahead need no torch, so they run while torch is being imported. Nothing is copied:
the kernels read weights in the dtype and place in which the checkpoint keeps them, and pages that the
kernel drops under pressure come back from the file.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.weights.gate import OPEN, Gate
from runtime.weights.plan import Piece, Plan

if TYPE_CHECKING:
    import torch

_MADV_POPULATE_READ = 22  # Linux 5.14; older kernels refuse it, and then reading ahead is all that happens
_STRIDE = 64 << 20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class MappedWeights:
    """The plan's files in memory. Constructing maps them; `load` brings their pages in.

    `gate` is what it reads through; it may be changed between two loads.
    """

    def __init__(self, plan: Plan, gate: Gate = OPEN) -> None:
        self.plan = plan
        self.gate = gate
        self._maps: dict[Path, mmap.mmap] = {}
        for path in plan.files:
            with os.fdopen(gate.open(path), "rb") as file:
                # A private mapping counts as writable memory, which torch asks for, and nobody writes.
                self._maps[path] = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=_PROTECTION)

    @property
    def num_bytes(self) -> int:
        """Size of all mapped files."""
        return sum(len(mapped) for mapped in self._maps.values())

    def load(self, on_progress: Callable[[int], None]) -> None:
        """Touch every page, in file order; `on_progress` is told the bytes brought in so far.

        The waiting happens in the kernel with Python's lock released. Raises what the gate raises.
        """
        done = 0
        for path, mapped in self._maps.items():
            address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
            _libc.madvise(address, len(mapped), mmap.MADV_WILLNEED)
            for start in range(0, len(mapped), _STRIDE):
                length = min(_STRIDE, len(mapped) - start)
                self.gate.wait(path, start, start + length)
                _libc.madvise(address + start, length, _MADV_POPULATE_READ)
                done += length
                on_progress(done)

    def unload(self) -> None:
        """Drop every page; those that are touched come back from the files, or all with `load`."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)

    def tensors(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """Each parameter's pieces as views of the mapped files, in the checkpoint's dtype."""
        return {
            parameter.name: tuple(self._view(piece) for piece in parameter.pieces)
            for parameter in self.plan.parameters
        }

    def _view(self, piece: Piece) -> torch.Tensor:
        import torch

        dtypes = {
            "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32,
            "F8_E4M3": torch.float8_e4m3fn,
        }  # fmt: skip
        tensor = piece.tensor
        count = (tensor.stop - tensor.start) // tensor.item_bytes
        mapped = self._maps[tensor.file]
        dtype = dtypes[tensor.dtype]
        if tensor.start % tensor.item_bytes:
            # The format does not promise alignment, and unaligned elements cannot be viewed.
            flat = torch.frombuffer(bytearray(mapped[tensor.start : tensor.stop]), dtype=dtype)
        else:
            flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=tensor.start)
        whole = flat.view(tensor.shape[0] if tensor.shape else 1, -1)[:, piece.columns[0] : piece.columns[1]]
        if len(tensor.shape) == 1:
            whole = flat
        ranges = [whole[first:last] for first, last in piece.rows]
        # Only rows that lie apart in the file are copied.
        return ranges[0] if len(ranges) == 1 else torch.cat((whole[:0], *ranges))


_PROTECTION = mmap.PROT_READ | mmap.PROT_WRITE
