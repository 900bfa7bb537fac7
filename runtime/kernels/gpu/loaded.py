"""A compiled kernel in the GPU's memory, launched by the driver.

Source: the CUDA Driver API reference, "Module Management" and "Execution Control".
"""

from __future__ import annotations

import ctypes
import functools
import struct
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from operator import itemgetter
from typing import Any

import torch

from runtime.kernels.gpu.binaries import Binary

_BUFFER_POINTER, _BUFFER_SIZE, _END = 1, 2, 0  # CU_LAUNCH_PARAM_*
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PREFER_SHARED = 1  # CU_FUNC_CACHE_PREFER_SHARED
# What every kernel may have without asking for it.
_PLAIN_SHARED_BYTES = 48 << 10
_POINTER_BYTES = 8
_START_EARLY = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: the number of an attribute, and its value in as much room as any takes."""

    _fields_ = [("id", c_int), ("_pad", c_int), ("value", c_int), ("_room", c_int * 15)]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", c_uint * 3), ("block", c_uint * 3), ("shared", c_uint), ("stream", c_void_p),
        ("attributes", c_void_p), ("num_attributes", c_uint),
    ]  # fmt: skip


class CannotLoad(Exception):
    """The driver does not take the code, or cannot say what arguments it takes."""


@functools.cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuLaunchKernel.argtypes = [c_void_p, *(c_uint,) * 7, *(c_void_p,) * 3]
    return driver


def _call(name: str, *arguments: object) -> None:
    try:
        status = getattr(_driver(), name)(*arguments)
    except AttributeError:
        raise CannotLoad(f"this driver has no {name}") from None
    if status:
        raise CannotLoad(f"{name} failed with status {status}")


class Loaded:
    """A binary, loaded; called with a grid and arguments, it is launched on torch's current stream.

    Launches come from one thread at a time, as their arguments are laid out in one place. Raises
    `CannotLoad`.
    """

    def __init__(self, binary: Binary) -> None:
        self._module, self._function = c_void_p(), c_void_p()
        _call("cuModuleLoadData", byref(self._module), c_char_p(binary.code))
        _call("cuModuleGetFunction", byref(self._function), self._module, c_char_p(binary.symbol.encode()))
        if binary.shared > _PLAIN_SHARED_BYTES:
            _call("cuFuncSetCacheConfig", self._function, _PREFER_SHARED)
            _call("cuFuncSetAttribute", self._function, _MAX_DYNAMIC_SHARED, c_int(binary.shared))
        self._threads, self._shared = binary.threads, binary.shared
        self._launch = _driver().cuLaunchKernel
        self._early = _Early(self._function, binary) if binary.early else None
        self._layout, size = self._laid_out(binary.formats)
        self._buffer = ctypes.create_string_buffer(size)
        self._size = c_size_t(size)
        self._extra = (c_void_p * 5)(
            _BUFFER_POINTER, ctypes.addressof(self._buffer), _BUFFER_SIZE, ctypes.addressof(self._size), _END
        )
        few = len(binary.passed) < 2  # of one index, itemgetter returns no tuple
        self._pick = (lambda all_: [all_[n] for n in binary.passed]) if few else itemgetter(*binary.passed)

    def _laid_out(self, formats: str) -> tuple[struct.Struct, int]:
        """Where the arguments lie, as the code says, and the bytes of them all.

        After those of the kernel Triton has some of its own, pointers, which are left null.
        """
        layout, end = "<", 0
        for number, (offset, size) in enumerate(self._parameters()):
            known = formats[number : number + 1]
            if size != (struct.calcsize(known) if known else _POINTER_BYTES):
                raise CannotLoad(f"argument {number} has {size} bytes")
            if known:
                layout += "x" * (offset - end) + known
            end = offset + size
        return struct.Struct(layout), end

    def _parameters(self) -> list[tuple[int, int]]:
        """Offset and size of each parameter."""
        found: list[tuple[int, int]] = []
        offset, size = c_size_t(), c_size_t()
        try:
            while True:
                _call("cuFuncGetParamInfo", self._function, c_size_t(len(found)), byref(offset), byref(size))
                found.append((offset.value, size.value))
        except CannotLoad:
            if not found:
                raise
            return found

    def __call__(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        if 0 in grid:
            return
        values = [
            each.data_ptr() if isinstance(each, torch.Tensor) else each for each in self._pick(arguments)
        ]
        self._layout.pack_into(self._buffer, 0, *values)
        stream = torch._C._cuda_getCurrentRawStream(0)
        if self._early is not None:
            status = self._early.launch(grid, stream, self._extra)
        else:
            status = self._launch(
                self._function, *grid, self._threads, 1, 1, self._shared, stream, None, self._extra
            )
        if status:
            raise RuntimeError(f"A kernel could not be launched (cuLaunchKernel: {status}).")


class _Early:
    """How a kernel is launched that may start before what was launched before it is through."""

    def __init__(self, function: c_void_p, binary: Binary) -> None:
        try:
            self._launch = _driver().cuLaunchKernelEx
        except AttributeError:
            raise CannotLoad("this driver has no cuLaunchKernelEx") from None
        self._function = function
        self._attribute = _Attribute(id=_START_EARLY, value=1)
        self._config = _Config(
            block=(binary.threads, 1, 1),
            shared=binary.shared,
            attributes=ctypes.addressof(self._attribute),
            num_attributes=1,
        )

    def launch(self, grid: tuple[int, ...], stream: int, extra: Any) -> int:
        """The driver's status."""
        self._config.grid[:] = grid
        self._config.stream = stream
        status: int = self._launch(byref(self._config), self._function, None, extra)
        return status
