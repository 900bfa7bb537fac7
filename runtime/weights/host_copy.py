"""A copy of device memory in pinned host memory, from which the device is filled again at the link's speed.

Pinning is slow, most of it being the kernel's work on pages that are touched for the first time. So the copy
is made in parts, whenever there is time, and some threads do that work for the parts that come next. What is
copied must not change afterwards. The copy itself is read-only once it is made.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from runtime.weights.cuda_driver import Driver
from runtime.weights.virtual_memory import VirtualMemory

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

_MADV_POPULATE_WRITE = 23  # Linux 5.14; on older kernels pinning touches the pages itself
_ALIGNMENT = 2 << 20
# How many threads touch and pin pages, and how many parts ahead of the one that is asked for.
_NUM_THREADS = 4
_PARTS_AHEAD = 8
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
        self._threads: ThreadPoolExecutor | None = None

    @property
    def num_bytes(self) -> int:
        """What the regions take."""
        return sum(region.num_bytes for region in self._regions)

    def make(self, part: int, parts: int) -> None:
        """Copy part number `part` of `parts`, unless that was done before.

        Raises `CudaError`, and `OSError` if there is no memory for it.
        """
        for number in range(part, min(part + 1 + _PARTS_AHEAD, parts)):
            if number not in self._parts:
                self._parts[number] = self._begin(number, parts)
        self._parts[part].make()
        if part == parts - 1:
            self._end_threads()

    def _begin(self, part: int, parts: int) -> _Part:
        if self._threads is None:
            from concurrent.futures import ThreadPoolExecutor

            self._threads = ThreadPoolExecutor(_NUM_THREADS, "pinning", self._driver.enter)
        size = -(-self.num_bytes // (parts * _ALIGNMENT)) * _ALIGNMENT
        pieces = list(self._pieces(part * size, (part + 1) * size))
        return _Part(self._driver, self._stream, pieces, self._threads)

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
        self._end_threads()
        for part in self._parts.values():
            part.close()
        self._parts.clear()

    def _end_threads(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None


class _Part:
    """Some pieces of device memory and their copy, whose memory is being pinned by one of `threads`."""

    def __init__(
        self,
        driver: Driver,
        stream: ctypes.c_void_p,
        pieces: list[tuple[int, int]],
        threads: ThreadPoolExecutor,
    ) -> None:
        self._driver = driver
        self._stream = stream
        self._pieces = pieces
        self._num_bytes = sum(size for _, size in pieces)
        self._is_made = False
        self._memory: mmap.mmap | None = None
        self._pinned: Future[None] | None = None
        if self._num_bytes:
            self._memory = mmap.mmap(-1, self._num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
            self._pinned = threads.submit(self._pin, self._memory)

    def _pin(self, memory: mmap.mmap) -> None:
        # Measured beside an H100: touched in huge pages and pinned then, 5.8 GB/s; in small ones 2.4, and
        # from the driver 1.1.
        memory.madvise(mmap.MADV_HUGEPAGE)
        _libc.madvise(self._address, self._num_bytes, _MADV_POPULATE_WRITE)
        self._driver.call(
            "cuMemHostRegister_v2", ctypes.c_void_p(self._address), ctypes.c_size_t(self._num_bytes), 0
        )
        self._unpin = weakref.finalize(self, _unpin, self._driver, memory, self._address)
        self._unpin.atexit = False  # the driver may be gone by then

    def make(self) -> None:
        """Copy, unless that was done before; see `HostCopy.make`."""
        if self._pinned is None or self._is_made:
            return
        self._pinned.result()
        for target, source, size in self.placed():
            self._driver.download(target, source, size, self._stream)
        self._driver.synchronize(self._stream)
        _libc.mprotect(self._address, self._num_bytes, mmap.PROT_READ)
        self._is_made = True

    def placed(self) -> Iterator[tuple[int, int, int]]:
        """(host address, device address, bytes) of each piece."""
        if self._memory is None:
            return
        address = self._address
        for device_address, size in self._pieces:
            yield address, device_address, size
            address += size

    def close(self) -> None:
        """Give back the memory; no thread is at work on it any more."""
        if self._pinned is not None and not self._pinned.cancelled() and self._pinned.exception() is None:
            self._unpin()
        self._pinned = self._memory = None


def _unpin(driver: Driver, memory: mmap.mmap, address: int) -> None:
    """Before the memory itself goes; if others got its addresses, they could not be pinned."""
    driver.call("cuMemHostUnregister", ctypes.c_void_p(address))
