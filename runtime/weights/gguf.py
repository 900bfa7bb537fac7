"""A reader for GGUF files, versions 2 and 3, little-endian.

A file is a header, typed key-value metadata, a table of tensors, and the tensors' data, aligned. The
file is memory-mapped: opening one reads the tables only, and every size in them is checked against
the file before it is believed.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from runtime.errors import FirstlightError
from runtime.weights.ggml_types import TYPES, GGMLType

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

# Real files have tens of entries and some thousand tensors; a larger count is a damaged header.
_MAX_ENTRIES = 1 << 16
_MAX_DIMENSIONS = 4
_MAX_ARRAY_DEPTH = 2

# Rows are dequantised in pieces of about this many values, so that float32 copies stay small.
_PIECE_VALUES = 1 << 22


class GGUFError(FirstlightError):
    """A GGUF file that is damaged, or that holds something this reader does not know."""


class TensorInfo(NamedTuple):
    """One row of the tensor table. `shape` is outermost first; `start` is a byte offset in the file."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GGUFFile:
    """An open GGUF file: `metadata` by key and `tensors` by name. Use it as a context manager.

    Raises GGUFError, which names the file and the fault, if the file cannot be what it claims to be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise GGUFError(f"{path}: the file is empty; fetch it again") from None
        except OSError as error:
            raise GGUFError(f"{path}: cannot be read: {error.strerror}") from error
        try:
            parser = _Parser(path, self._map)
            self.metadata, self.tensors = parser.metadata, parser.tensors
        except GGUFError:
            self._map.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._map.close()

    def raw(self, tensor: TensorInfo) -> bytes:
        """A tensor's bytes as they lie in the file."""
        return self._map[tensor.start : tensor.start + tensor.nbytes]

    def pieces(self, tensor: TensorInfo) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
        """A tensor's values in order, flat, as (where they belong, float32 values), piece by piece."""
        kind = tensor.type
        num_blocks = tensor.nbytes // kind.block_bytes
        step = max(1, _PIECE_VALUES // kind.block_size)
        for first in range(0, num_blocks, step):
            last = min(first + step, num_blocks)
            start = tensor.start + first * kind.block_bytes
            data = self._map[start : start + (last - first) * kind.block_bytes]
            blocks = np.frombuffer(data, dtype=np.uint8).reshape(-1, kind.block_bytes)
            place = slice(first * kind.block_size, last * kind.block_size)
            yield place, kind.dequantise(blocks).reshape(-1)


class _Parser:
    """Reads the tables of one file from front to back."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._at = 0
        num_tensors, num_entries = self._header()
        self.metadata = self._metadata(num_entries)
        self.tensors = self._tensors(num_tensors)

    def _fail(self, what: str) -> GGUFError:
        return GGUFError(f"{self._path}: {what}")

    def _take(self, size: int, what: str) -> int:
        """Claim the next `size` bytes and return where they start."""
        start, self._at = self._at, self._at + size
        if self._at > len(self._data):
            raise self._fail(
                f"{what} at byte {start} needs {size} bytes, but the file ends at byte {len(self._data)}; "
                "it is damaged or was not fetched completely"
            )
        return start

    def _unpack(self, code: str, what: str) -> Any:
        start = self._take(struct.calcsize("<" + code), what)
        return struct.unpack_from("<" + code, self._data, start)[0]

    def _string(self, what: str) -> str:
        length = self._unpack("Q", what)
        start = self._take(length, what)
        try:
            return self._data[start : self._at].decode("utf-8")
        except UnicodeDecodeError:
            raise self._fail(f"{what} at byte {start} is not UTF-8 text") from None

    def _header(self) -> tuple[int, int]:
        """Check magic and version; returns the number of tensors and of metadata entries."""
        start = self._take(4, "the magic number")
        if self._data[start : self._at] != _MAGIC:
            raise self._fail("is not a GGUF file: it does not begin with the letters GGUF")
        version = self._unpack("I", "the version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            order = " in big-endian order" if swapped in _VERSIONS else ""
            raise self._fail(f"GGUF version {swapped if order else version}{order} is not supported")
        counts = self._unpack("Q", "the tensor count"), self._unpack("Q", "the metadata count")
        for count, what in zip(counts, ("tensors", "metadata entries"), strict=True):
            if count > _MAX_ENTRIES:
                raise self._fail(f"the header claims {count} {what}; more than {_MAX_ENTRIES} is damage")
        return counts

    def _metadata(self, count: int) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for index in range(count):
            key = self._string(f"the key of metadata entry {index}")
            if key in entries:
                raise self._fail(f"metadata key {key!r} appears twice")
            kind = self._unpack("I", f"the type of {key!r}")
            entries[key] = self._value(kind, f"the value of {key!r}", _MAX_ARRAY_DEPTH)
        return entries

    def _value(self, kind: int, what: str, depth: int) -> Any:
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind], what)
        if kind == _STRING:
            return self._string(what)
        if kind != _ARRAY or depth == 0:
            raise self._fail(f"{what} has the unknown type {kind}")
        item = self._unpack("I", what)
        length = self._unpack("Q", what)
        if item in _SCALARS:
            start = self._take(length * struct.calcsize("<" + _SCALARS[item]), what)
            return list(struct.unpack_from(f"<{length}{_SCALARS[item]}", self._data, start))
        # Each string or nested array takes at least its 8 bytes of length.
        if length * 8 > len(self._data) - self._at:
            raise self._fail(f"{what} claims {length} items, more than the rest of the file can hold")
        return [self._value(item, what, depth - 1) for _ in range(length)]

    def _tensors(self, count: int) -> dict[str, TensorInfo]:
        rows = [self._tensor_row(index) for index in range(count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise self._fail(f"general.alignment is {alignment!r}; it must be a positive multiple of 8")
        base = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        end, before = base, "the tables"
        for row in sorted(rows, key=lambda row: row.start):
            tensor = row._replace(start=base + row.start)
            if row.start % alignment:
                raise self._fail(f"tensor {row.name!r} starts at {row.start}, not a multiple of {alignment}")
            if tensor.start < end:
                raise self._fail(f"tensor {row.name!r} overlaps {before}")
            end, before = tensor.start + tensor.nbytes, f"tensor {row.name!r}"
            if end > len(self._data):
                raise self._fail(
                    f"tensor {row.name!r} ends at byte {end}, but the file ends at byte {len(self._data)}; "
                    "it is damaged or was not fetched completely"
                )
            if row.name in tensors:
                raise self._fail(f"tensor {row.name!r} appears twice")
            tensors[row.name] = tensor
        return tensors

    def _tensor_row(self, index: int) -> TensorInfo:
        """One row of the table, with `start` still relative to where the data begins."""
        name = self._string(f"the name of tensor {index}")
        num_dimensions = self._unpack("I", f"the rank of tensor {name!r}")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self._fail(
                f"tensor {name!r} has {num_dimensions} dimensions; expected 1 to {_MAX_DIMENSIONS}"
            )
        # The file lists the innermost dimension first.
        sizes = [self._unpack("Q", f"the shape of tensor {name!r}") for _ in range(num_dimensions)]
        number = self._unpack("I", f"the type of tensor {name!r}")
        start = self._unpack("Q", f"the offset of tensor {name!r}")
        kind = TYPES.get(number)
        if kind is None:
            known = ", ".join(known.name for known in TYPES.values())
            raise self._fail(
                f"tensor {name!r} has ggml type {number}, which is not supported; supported are {known}"
            )
        num_values = 1
        for size in sizes:
            num_values *= size
        if num_values == 0 or sizes[0] % kind.block_size:
            raise self._fail(f"tensor {name!r} of type {kind.name} cannot have rows of {sizes[0]} values")
        nbytes = num_values // kind.block_size * kind.block_bytes
        return TensorInfo(name, kind, tuple(reversed(sizes)), start, nbytes)
