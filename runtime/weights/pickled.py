"""Files that torch pickled (`pytorch_model*.bin`) -> safetensors, without running anything in them.

`torch.save` writes an uncompressed zip archive: `<root>/data.pkl`, the pickled description of the tensors,
and the bytes of each storage in `<root>/data/<key>`. A pickle is a program; this one may call the handful
of functions that tensors are described with, each of which is an inert stand-in here, and nothing else.
Source: torch/serialization.py and torch/_utils.py.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from runtime.errors import FirstlightError
from runtime.weights.safetensors_writer import SafetensorsWriter

Progress = Callable[[int, int], None]
_Values = npt.NDArray[Any]

# The descriptions of a few thousand tensors take a few hundred kB.
_MAX_DESCRIPTION_BYTES = 64 << 20
_MAX_DIMS = 16
_READ_BYTES = 1 << 20
# torch's name of a storage: the dtype as safetensors spells it, and what numpy holds its bytes in.
_STORAGES = {
    "DoubleStorage": ("F64", "<f8"), "FloatStorage": ("F32", "<f4"), "HalfStorage": ("F16", "<f2"),
    "BFloat16Storage": ("BF16", "<u2"), "LongStorage": ("I64", "<i8"), "IntStorage": ("I32", "<i4"),
    "ShortStorage": ("I16", "<i2"), "CharStorage": ("I8", "<i1"), "ByteStorage": ("U8", "<u1"),
    "BoolStorage": ("BOOL", "<u1"),
}  # fmt: skip

# What reading a damaged archive may raise.
_DAMAGES = (zipfile.BadZipFile, ValueError, RuntimeError, EOFError, OverflowError, struct.error)


class PickledError(FirstlightError):
    """A pickled checkpoint that cannot be read, or holds something else than tensors."""


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    numpy_dtype: str
    size: int


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage: everything counts in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def safetensors_name(name: str) -> str:
    """What the safetensors file is called that a pickled file is converted to."""
    return name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"


def convert_pickled(path: Path, target: Path, on_progress: Progress | None = None) -> None:
    """Write the tensors of the pickled file `path` to the safetensors file `target`.

    Handles one storage at a time. Calls `on_progress(bytes written, bytes in all)` after each tensor.
    `target` is complete only when this returns. Raises PickledError, and then there may be a part of it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _Converter(path, archive).write(target, on_progress or (lambda done, total: None))
    except _DAMAGES as error:
        raise PickledError(
            f"{path} is no whole archive as torch has written them since version 1.6 ({error}). Download it "
            "again; if it is whole, convert it to safetensors where you trust it."
        ) from error


class _Converter:
    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._path = path
        self._archive = archive
        self._members = {info.filename: info for info in archive.infolist()}
        descriptions = [name for name in self._members if name.endswith("/data.pkl")]
        if len(descriptions) != 1:
            self._refuse("it holds no data.pkl, or several")
        self._root = descriptions[0].removesuffix("data.pkl")
        order = self._members.get(self._root + "byteorder")
        if order is not None and archive.read(order) != b"little":
            self._refuse("its bytes are in big-endian order")

    def write(self, target: Path, on_progress: Progress) -> None:
        tensors = self._tensors()
        total = sum(_num_bytes(tensor) for tensor in tensors.values())
        done = 0
        # Tied weights share a storage, which is read once for all its neighbours.
        key = ""
        values: _Values = np.empty(0, np.uint8)
        with SafetensorsWriter(target, tensors) as writer:
            for name, tensor in tensors.items():
                if tensor.storage.key != key:
                    key, values = tensor.storage.key, self._read(tensor.storage)
                writer.add(name, tensor.storage.dtype, tensor.shape, _view(tensor, values))
                done += _num_bytes(tensor)
                on_progress(done, total)

    def _tensors(self) -> dict[str, _Tensor]:
        info = self._members[self._root + "data.pkl"]
        if info.file_size > _MAX_DESCRIPTION_BYTES:
            self._refuse(f"the description of its tensors has {info.file_size} bytes")
        try:
            found = _Unpickler(io.BytesIO(self._archive.read(info))).load()
        except PickledError as error:
            self._refuse(str(error))
        except Exception as error:  # a damaged or hostile program may fail in any way
            self._refuse(f"its description of tensors is damaged ({error!r})")
        if not isinstance(found, dict):
            self._refuse(f"it holds a {type(found).__name__} and no tensors by name")
        for name, tensor in found.items():
            if not isinstance(name, str) or not isinstance(tensor, _Tensor):
                self._refuse(f"{name!r} in it is a {type(tensor).__name__} and no tensor")
            self._check(name, tensor)
        return dict(found)

    def _check(self, name: str, tensor: _Tensor) -> None:
        """Whether the tensor lies within its storage, and that within the archive."""
        numbers = (tensor.offset, *tensor.shape, *tensor.strides, tensor.storage.size)
        proper = all(type(number) is int and number >= 0 for number in numbers)
        if not proper or len(tensor.shape) != len(tensor.strides) or len(tensor.shape) > _MAX_DIMS:
            self._refuse(f"tensor {name!r} has no proper shape")
        steps = zip(tensor.shape, tensor.strides, strict=True)
        last = tensor.offset + sum((size - 1) * stride for size, stride in steps)
        if math.prod(tensor.shape) and last >= tensor.storage.size:
            self._refuse(f"tensor {name!r} reaches beyond its storage")
        # A view may repeat what it shows, and so be any size.
        if math.prod(tensor.shape) > tensor.storage.size:
            self._refuse(f"tensor {name!r} is larger than its storage")
        info = self._members.get(f"{self._root}data/{tensor.storage.key}")
        size = tensor.storage.size * np.dtype(tensor.storage.numpy_dtype).itemsize
        if info is None or info.file_size != size or info.compress_type != zipfile.ZIP_STORED:
            self._refuse(f"the bytes of tensor {name!r} are not there as they should be")

    def _read(self, storage: _Storage) -> _Values:
        """A storage's values; the archive's own checksum is verified."""
        values: _Values = np.empty(storage.size, storage.numpy_dtype)
        buffer, done = values.view(np.uint8), 0
        try:
            with self._archive.open(f"{self._root}data/{storage.key}") as stream:
                while block := stream.read(_READ_BYTES):
                    buffer[done : done + len(block)] = np.frombuffer(block, np.uint8)
                    done += len(block)
        except _DAMAGES as error:
            self._refuse(f"it is damaged ({error})")
        if done < len(buffer):
            self._refuse("it is cut short")
        return values

    def _refuse(self, why: str) -> NoReturn:
        raise PickledError(
            f"{self._path} cannot be used: {why}. Only tensors are read from pickled files, and nothing in "
            "them is run; use a repository that has safetensors."
        )


def _num_bytes(tensor: _Tensor) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.storage.numpy_dtype).itemsize


def _view(tensor: _Tensor, values: _Values) -> _Values:
    """The tensor's elements in the order of its shape."""
    strides = tuple(stride * values.itemsize for stride in tensor.strides)
    part = values[tensor.offset :]
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(part, tensor.shape, strides, writeable=False))


class _Unpickler(pickle.Unpickler):
    """Knows what descriptions of tensors are made of, and none of Python's own functions."""

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        if known is None:
            raise PickledError(f"it asks for {module}.{name}, which is no part of a tensor")
        return known

    def persistent_load(self, pid: Any) -> _Storage:
        kind, (dtype, numpy_dtype), key, _, size = pid
        if kind != "storage" or not isinstance(key, str):
            raise PickledError("it refers to something that is no storage")
        return _Storage(key, dtype, numpy_dtype, size)


def _rebuild_tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *_: object) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise PickledError("a tensor in it has no storage")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: _Tensor, *_: object) -> _Tensor:
    return tensor


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): kind for name, kind in _STORAGES.items()},
}
