"""The few calls of the CUDA driver that loading needs, through ctypes, so that they work before torch.

Every call releases Python's lock while it waits. Source: the CUDA Driver API reference (cuda.h).
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int, c_size_t, c_ubyte, c_uint64, c_void_p

from runtime.errors import FirstlightError

_EVENT_NO_TIMING = 2
_MEMORY_HOST, _MEMORY_DEVICE = 1, 2


class CudaError(FirstlightError):
    """The driver refused a call, or there is none."""


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = [
        ("src_x", c_size_t), ("src_y", c_size_t), ("src_type", c_int), ("src_host", c_void_p),
        ("src_device", c_uint64), ("src_array", c_void_p), ("src_pitch", c_size_t),
        ("dst_x", c_size_t), ("dst_y", c_size_t), ("dst_type", c_int), ("dst_host", c_void_p),
        ("dst_device", c_uint64), ("dst_array", c_void_p), ("dst_pitch", c_size_t),
        ("width", c_size_t), ("height", c_size_t),
    ]  # fmt: skip


class Driver:
    """The primary context of one device, the one that torch uses too. Raises `CudaError` without a GPU."""

    def __init__(self, index: int = 0) -> None:
        try:
            self._lib = ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise CudaError("There is no CUDA driver (libcuda.so.1) on this machine.") from None
        self.call("cuInit", 0)
        device = c_int()
        self.call("cuDeviceGet", byref(device), index)
        self.context = c_void_p()
        self.call("cuDevicePrimaryCtxRetain", byref(self.context), device)
        self.enter()

    def call(self, name: str, *arguments: object) -> None:
        """Call a function of the driver. Raises `CudaError` with its words if it fails."""
        status = getattr(self._lib, name)(*arguments)
        if status:
            raise self.error(name, status)

    def error(self, name: str, status: int) -> CudaError:
        """What the driver says about a function of its that failed with `status`."""
        text = ctypes.c_char_p()
        self._lib.cuGetErrorString(status, byref(text))
        return CudaError(f"The CUDA driver failed in {name}: {(text.value or b'?').decode()} ({status}).")

    def enter(self) -> None:
        """Make the context current in this thread; every thread that calls the driver needs this once."""
        self.call("cuCtxSetCurrent", self.context)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the device."""
        free, total = c_size_t(), c_size_t()
        self.call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value

    def allocate(self, num_bytes: int) -> int:
        """Device memory; returns its address."""
        address = c_uint64()
        self.call("cuMemAlloc_v2", byref(address), c_size_t(num_bytes))
        return address.value

    def free(self, address: int) -> None:
        """Give back device memory from `allocate`."""
        self.call("cuMemFree_v2", c_uint64(address))

    def allocate_pinned(self, num_bytes: int) -> int:
        """Pinned host memory, which copies run from at full speed; returns its address."""
        address = c_void_p()
        self.call("cuMemHostAlloc", byref(address), c_size_t(num_bytes), 0)
        assert address.value is not None
        return address.value

    def free_pinned(self, address: int) -> None:
        """Give back memory from `allocate_pinned`."""
        self.call("cuMemFreeHost", c_void_p(address))

    def stream(self) -> c_void_p:
        """A new stream that waits for no other."""
        stream = c_void_p()
        self.call("cuStreamCreate", byref(stream), 1)
        return stream

    def event(self) -> c_void_p:
        """A new event, to be recorded on a stream and waited for."""
        event = c_void_p()
        self.call("cuEventCreate", byref(event), _EVENT_NO_TIMING)
        return event

    def destroy(self, event: c_void_p) -> None:
        """Give back an event."""
        self.call("cuEventDestroy_v2", event)

    def record(self, event: c_void_p, stream: c_void_p) -> None:
        """Note the present end of the stream's work."""
        self.call("cuEventRecord", event, stream)

    def wait(self, event: c_void_p) -> None:
        """Wait until what was noted is done; at once if nothing was."""
        self.call("cuEventSynchronize", event)

    def hold(self, stream: int, event: c_void_p) -> None:
        """Whatever is begun on the stream from here on waits for what was noted."""
        self.call("cuStreamWaitEvent", c_void_p(stream), event, 0)

    def synchronize(self, stream: c_void_p) -> None:
        """Wait until all that was begun on a stream is done."""
        self.call("cuStreamSynchronize", stream)

    def copy(self, target: int, source: int, num_bytes: int, stream: c_void_p) -> None:
        """Begin a copy from pinned memory to the device."""
        self.call("cuMemcpyHtoDAsync_v2", c_uint64(target), c_void_p(source), c_size_t(num_bytes), stream)

    def download(self, target: int, source: int, num_bytes: int, stream: c_void_p) -> None:
        """Begin a copy from the device to pinned memory."""
        self.call("cuMemcpyDtoHAsync_v2", c_void_p(target), c_uint64(source), c_size_t(num_bytes), stream)

    def clear(self, target: int, num_bytes: int, stream: c_void_p) -> None:
        """Begin to fill device memory with zeros."""
        self.call("cuMemsetD8Async", c_uint64(target), c_ubyte(0), c_size_t(num_bytes), stream)

    def copy_rows(
        self, target: int, source: int, width: int, rows: int, source_pitch: int, stream: c_void_p
    ) -> None:
        """Begin a copy of `rows` runs of `width` bytes, `source_pitch` apart, to where they lie close."""
        copy = _Copy2D(
            src_type=_MEMORY_HOST, src_host=source, src_pitch=source_pitch,
            dst_type=_MEMORY_DEVICE, dst_device=target, dst_pitch=width,
            width=width, height=rows,
        )  # fmt: skip
        self.call("cuMemcpy2DAsync_v2", byref(copy), stream)
