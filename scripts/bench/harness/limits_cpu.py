"""What the processor and its memory can do, measured beside the servers.

Memory is read with the C library's `memchr`, which runs at the memory's own speed without Python's
lock; arithmetic is numpy's float32 matrix product.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time

_LIBC = ctypes.CDLL(None)
_LIBC.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
_LIBC.memchr.restype = ctypes.c_void_p

_READ_BYTES = 256 << 20
"""A thread's share: many times what caches hold."""
_MATRIX = 2048
REPEATS = 5


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0))


def memory_read(threads: int) -> float:
    """Bytes per second that `threads` threads read together: the best of several passes."""
    buffers = [bytearray(b"\x01") * _READ_BYTES for _ in range(threads)]
    pointers = [ctypes.addressof(ctypes.c_char.from_buffer(buffer)) for buffer in buffers]
    times = []
    for _ in range(REPEATS):
        readers = [threading.Thread(target=_LIBC.memchr, args=(at, 2, _READ_BYTES)) for at in pointers]
        began = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        times.append(time.perf_counter() - began)
    return threads * _READ_BYTES / min(times)


def matrix_product() -> float:
    """Float32 operations per second of a product of two square matrices, on all threads of numpy's BLAS."""
    import numpy as np

    random = np.random.default_rng(0)
    left, right = (random.standard_normal((_MATRIX, _MATRIX), dtype=np.float32) for _ in range(2))
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - began)
    return 2 * _MATRIX**3 / min(times)
