"""A copy of device memory in pinned host memory, from which the device is filled again at the link's speed.

Pinning is slow, so the copy is made in parts, whenever there is time. What it copies must not change
afterwards. The copy itself is read-only once it is made.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Iterator, Sequence

from runtime.weights.cuda_driver import Driver
from runtime.weights.virtual_memory import VirtualMemory

_MADV_POPULATE_WRITE = 23  # Linux 5.14; on older kernels pinning touches the pages itself
_ALIGNMENT = 2 << 20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class HostCopy:
    """The content of some regions. It is made part by part, and good once every part was made.

    All copying is done on `stream`.
    """

    def __init__(self, driver: Driver, regions: Sequence[VirtualMemory], stream: ctypes.c_void_p) -> None:
        self._driver = driver
        self._regions = regions
        self._stream = stream
        self._parts: dict[int, _Part] = {}

    @property
    def num_bytes(self) -> int:
        """What the regions take."""
        return sum(region.num_bytes for region in self._regions)

    def make(self, part: int, parts: int) -> None:
        """Copy part number `part` of `parts`, unless that was done before."""
        if part not in self._parts:
            size = -(-self.num_bytes // (parts * _ALIGNMENT)) * _ALIGNMENT
            pieces = list(self._pieces(part * size, (part + 1) * size))
            self._parts[part] = _Part(self._driver, self._stream, pieces)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(address, bytes) of what lies between two offsets in all regions, one after the other."""
        for region in self._regions:
            first, last = max(start, 0), min(stop, region.num_bytes)
            if first < last:
                yield region.address + first, last - first
            start, stop = start - region.num_bytes, stop - region.num_bytes

    def fill(self) -> None:
        """Take the regions' memory, and begin to fill it: that is done when the stream is.

        Without a copy, only the memory is taken.
        """
        for region in self._regions:
            region.take()
        for part in self._parts.values():
            for source, target, size in part.placed():
                self._driver.copy(target, source, size, self._stream)

    def close(self) -> None:
        """Give back all parts' memory."""
        for part in self._parts.values():
            part.close()
        self._parts.clear()


class _Part:
    """Some pieces of device memory and their copy."""

    def __init__(self, driver: Driver, stream: ctypes.c_void_p, pieces: list[tuple[int, int]]) -> None:
        self._driver = driver
        self._pieces = pieces
        num_bytes = sum(size for _, size in pieces)
        self._memory: mmap.mmap | None = None
        if not num_bytes:
            return
        # Measured beside an H100: touched in huge pages and pinned then, 5.8 GB/s; in small ones 2.4, and
        # from the driver 1.1.
        self._memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        _libc.madvise(self._address, num_bytes, _MADV_POPULATE_WRITE)
        driver.call("cuMemHostRegister_v2", ctypes.c_void_p(self._address), ctypes.c_size_t(num_bytes), 0)
        self._unpin = weakref.finalize(self, _unpin, driver, self._memory, self._address)
        self._unpin.atexit = False  # the driver may be gone by then
        for target, source, size in self.placed():
            driver.download(target, source, size, stream)
        driver.synchronize(stream)
        _libc.mprotect(self._address, num_bytes, mmap.PROT_READ)

    def placed(self) -> Iterator[tuple[int, int, int]]:
        """(host address, device address, bytes) of each piece."""
        if self._memory is None:
            return
        address = self._address
        for device_address, size in self._pieces:
            yield address, device_address, size
            address += size

    def close(self) -> None:
        if self._memory is not None:
            self._unpin()
            self._memory = None


def _unpin(driver: Driver, memory: mmap.mmap, address: int) -> None:
    """Before the memory itself goes; if others got its addresses, they could not be pinned."""
    driver.call("cuMemHostUnregister", ctypes.c_void_p(address))
