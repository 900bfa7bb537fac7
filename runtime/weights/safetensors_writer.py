"""Writes a safetensors file, tensor by tensor, so that each can be used in place from a memory map.

The format: a little-endian 64-bit header length, a JSON header, and the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

ALIGNMENT = 64
"""Bytes. Tensors whose sizes are multiples of this all start at multiples of it in the file."""

# Room a header entry takes beside its name: dtype, shape, two offsets and punctuation, generously.
_ENTRY_ROOM = 192


class SafetensorsWriter:
    """Use it as a context manager: give it all names first, then add the tensors in file order.

    The header comes first in the file but is known last, so room is left for it and spaces fill
    what it does not need.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        room = 8 + sum(len(json.dumps(name)) + _ENTRY_ROOM for name in names) + _ENTRY_ROOM
        self._data_start = -(-room // ALIGNMENT) * ALIGNMENT
        self._header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._size = 0
        self._file = path.open("wb")
        self._file.seek(self._data_start)

    def add(self, name: str, dtype: str, shape: tuple[int, ...], data: npt.NDArray[np.generic]) -> None:
        """Append a tensor: `dtype` as the format spells it (F16, BF16, F32), `data` in memory order."""
        end = self._size + data.nbytes
        self._header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [self._size, end]}
        self._size = end
        data.tofile(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        with self._file as file:
            if kind is None:
                length = self._data_start - 8
                header = json.dumps(self._header, separators=(",", ":")).encode().ljust(length)
                file.seek(0)
                file.write(length.to_bytes(8, "little") + header)
