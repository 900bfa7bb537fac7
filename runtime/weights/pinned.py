"""Host memory that the device's copies run from at full speed, because its pages cannot go away.

The driver finds and holds each page, which takes long where pages are small or have not been touched yet.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

from runtime.weights.cuda_driver import CudaError, Driver

_READ_ONLY = 8  # CU_MEMHOSTREGISTER_READ_ONLY
# Linux 5.14; on older kernels pinning touches the pages itself.
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
# The page cache reads ahead at least as far as this, so what lies between two looks is mostly there, too.
_LOOK_BYTES = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FAILED = ctypes.c_void_p(-1).value


class Pinned:
    """A mapping whose pages are pinned, until it is closed or forgotten. Raises `CudaError`."""

    def __init__(self, driver: Driver, mapping: int, num_bytes: int, flags: int = 0) -> None:
        self.address = mapping
        self._mapping, self._num_bytes = mapping, num_bytes
        try:
            driver.call("cuMemHostRegister_v2", ctypes.c_void_p(mapping), ctypes.c_size_t(num_bytes), flags)
        except CudaError:
            _libc.munmap(mapping, num_bytes)
            raise
        self._unpin = weakref.finalize(self, _unpin, driver, mapping, num_bytes)
        self._unpin.atexit = False  # the driver may be gone by then

    def protect(self) -> None:
        """From here on it is only read."""
        _libc.mprotect(self._mapping, self._num_bytes, mmap.PROT_READ)

    def close(self) -> None:
        """Give the memory back."""
        self._unpin()


def pinned_memory(driver: Driver, num_bytes: int) -> Pinned:
    """New memory. Raises `CudaError`, and `OSError` if there is none."""
    # Measured beside an H100: touched in huge pages and pinned then, 5.8 GB/s; in small ones 2.4, and from
    # the driver 1.1.
    mapping = _map(num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    _libc.madvise(mapping, num_bytes, mmap.MADV_HUGEPAGE)
    _libc.madvise(mapping, num_bytes, _MADV_POPULATE_WRITE)
    return Pinned(driver, mapping, num_bytes)


def pinned_run(driver: Driver, descriptor: int, start: int, num_bytes: int) -> Pinned | None:
    """`num_bytes` of a file from `start` on, where the page cache has them; its `address` is that of `start`.

    None if they are not there, or cannot be pinned: not every driver, kernel and file system allows that.
    """
    if not _is_cached(descriptor, start, num_bytes):
        return None
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    length = start + num_bytes - first
    try:
        mapping = _map(length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, first)
        _libc.madvise(mapping, length, _MADV_POPULATE_READ)
        pinned = Pinned(driver, mapping, length, _READ_ONLY)
    except (CudaError, OSError):
        return None
    pinned.address += start - first
    return pinned


def _is_cached(descriptor: int, start: int, num_bytes: int) -> bool:
    """Whether the page cache has a run of a file, by a look here and there."""
    byte = bytearray(1)
    try:
        return all(
            os.preadv(descriptor, [byte], at, os.RWF_NOWAIT) == 1
            for at in (*range(start, start + num_bytes, _LOOK_BYTES), start + num_bytes - 1)
        )
    except OSError:
        return False  # it would have to be waited for, or the file system cannot tell


def _map(num_bytes: int, protection: int, flags: int, descriptor: int, offset: int) -> int:
    mapping = _libc.mmap(None, num_bytes, protection, flags, descriptor, offset)
    if mapping == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), f"mapping {num_bytes} bytes: {os.strerror(ctypes.get_errno())}")
    return int(mapping)


def _unpin(driver: Driver, mapping: int, num_bytes: int) -> None:
    """Before the memory itself goes; if others got its addresses, they could not be pinned."""
    driver.call("cuMemHostUnregister", ctypes.c_void_p(mapping))
    _libc.munmap(mapping, num_bytes)
