"""What of an engine's memory on the CPU comes and goes: pages, which the kernel brings back when touched."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch

from runtime.protocol import SleepLevel
from runtime.weights.loader import MappedWeights

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class HostMemory:
    """The pool of the KV cache and the mapped weights; a `Memory`.

    The weights are in main memory already, so at level 1 they stay mapped, and at level 2 they wait in
    the page cache, which the kernel may take for other things.
    """

    def __init__(self, weights: MappedWeights) -> None:
        self._weights = weights
        self._pool: list[torch.Tensor] = []
        self._level: SleepLevel | None = None

    def derived(self) -> AbstractContextManager[None]:
        """See `Memory.derived`: it stays where it is."""
        return nullcontext()

    def cache(self) -> AbstractContextManager[None]:
        """See `Memory.cache`: here, `note_pool` says what that is."""
        return nullcontext()

    def on_reload(self, work: Callable[[], object]) -> None:
        """See `Memory.on_reload`: mapped weights are never written to, and come back as they were."""

    def note_pool(self, pool: Iterable[torch.Tensor]) -> None:
        """These tensors are the pool of the KV cache."""
        self._pool = list(pool)

    def prepare(self, level: SleepLevel, part: int, parts: int) -> None:
        """Nothing has to be copied; see `Memory.prepare`."""

    def give_back(self, level: SleepLevel) -> None:
        """See `Memory.give_back`."""
        for tensor in self._pool:
            _drop_pages(tensor)
        if level == 2:
            self._weights.unload()
        _libc.malloc_trim(0)
        self._level = level

    def tidy(self) -> None:
        """Pages are the kernel's business; see `Memory.tidy`."""

    def take_back(self) -> None:
        """See `Memory.take_back`."""
        if self._level == 2:
            self._weights.load(lambda done: None)
        self._level = None


def _drop_pages(tensor: torch.Tensor) -> None:
    """Free the pages that lie wholly in a tensor, whose content is lost."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start:
        _libc.madvise(start, stop - start, mmap.MADV_DONTNEED)
