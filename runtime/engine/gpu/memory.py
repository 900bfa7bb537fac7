"""What of an engine's memory on a GPU comes and goes, at addresses that stay as they are.

Tensors that are allocated in a `Pool` lie in memory of this kind, as the weights' arena does. torch has a
door for that: a pool of its caching allocator may take its memory from functions of one's own
(https://docs.pytorch.org/docs/stable/notes/cuda.html, "Mixing different CUDA system allocators").
"""

from __future__ import annotations

import atexit
import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from weakref import WeakSet

import torch

from runtime.engine.gpu.arriving import Arriving
from runtime.engine.memory import pinnable_bytes
from runtime.engine.pace import uncollected
from runtime.protocol import SleepLevel
from runtime.weights.cuda_driver import CudaError, Driver
from runtime.weights.host_copy import HostCopy, extents_of_plan, extents_of_regions
from runtime.weights.loaded_files import LoadedFiles
from runtime.weights.upload import DeviceWeights
from runtime.weights.virtual_memory import VirtualMemory

_ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
_FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
# torch keeps the bare addresses of a pool's allocator and functions, and calls them when the last of what
# was allocated there is freed: that can be after the pool is gone.
_called_by_torch: list[object] = []
_pools: WeakSet[torch.cuda.MemPool] = WeakSet()
# What must be left of the host's memory beside a copy of the weights.
_HOST_RESERVE_BYTES = 2 << 30


class Pool:
    """torch's allocations within `use`, in memory that can be given back and taken anew."""

    def __init__(self, driver: Driver) -> None:
        self.regions: dict[int, VirtualMemory] = {}
        functions = _ALLOCATE(partial(_allocate, driver, self.regions)), _FREE(partial(_free, self.regions))
        allocate, free = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
        allocator = torch._C._cuda_customAllocator(allocate, free)
        _called_by_torch.extend((allocator, *functions))
        self._pool = torch.cuda.MemPool(allocator)
        _pools.add(self._pool)

    @property
    def id(self) -> tuple[int, int]:
        """What torch knows the pool by."""
        return self._pool.id

    @contextmanager
    def use(self) -> Iterator[None]:
        """What this thread allocates on the device meanwhile lies in the pool."""
        with uncollected(), torch.cuda.use_mem_pool(self._pool):
            yield


@atexit.register
def _keep_pools() -> None:
    """Pools that are left when Python ends stay for ever: functions that free cannot be called any more."""
    for pool in _pools:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool))


def _allocate(
    driver: Driver, regions: dict[int, VirtualMemory], num_bytes: int, device: int, stream: int | None
) -> int | None:
    try:
        region = VirtualMemory(driver, num_bytes)
    except CudaError:
        return None  # torch says that memory is short, and how much there is
    regions[region.address] = region
    return region.address


def _free(
    regions: dict[int, VirtualMemory], address: int, num_bytes: int, device: int, stream: int | None
) -> None:
    regions.pop(address).close()


class DeviceMemory:
    """The weights' arena, what was made of weights while they were loaded, and the KV cache; a `Memory`.

    At level 1 all weights are kept in pinned host memory, once. At level 2 the arena is not: the loader fills
    it again. Nothing of the KV cache is kept. `num_ranks` engine processes share the host's memory.
    """

    def __init__(self, driver: Driver, weights: DeviceWeights | None, num_ranks: int) -> None:
        driver.enter()  # the device was found in another thread
        self._weights = weights
        self._num_ranks = num_ranks
        self._derived = Pool(driver)
        self._cache = Pool(driver)
        self._scratch = Pool(driver)
        self._arenas = [] if weights is None else [weights.memory]
        self._stream, self._clearing = driver.stream(), driver.stream()
        self._arriving = Arriving(driver)
        self._arena_copy: HostCopy | None = None
        self._derived_copy: HostCopy | None = None
        self._driver = driver
        self._keeps_arena = False
        self._arena_is_kept = False
        self._on_reload: Callable[[], object] | None = None

    def derived(self) -> AbstractContextManager[None]:
        """See `Memory.derived`."""
        return self._derived.use()

    def cache(self) -> AbstractContextManager[None]:
        """See `Memory.cache`."""
        return self._cache.use()

    def scratch(self) -> AbstractContextManager[None]:
        """For what holds nothing while nothing runs, or zeros; after a sleep it holds zeros."""
        return self._scratch.use()

    def graph_pool(self, num_bytes: int) -> tuple[int, int]:
        """Where CUDA graphs may keep what they compute with, as torch's captures take it.

        The current stream's graphs find `num_bytes` there in one piece. Captures in ascending order of size
        would else each bring a new one, as none fits into those before. What graphs of several ranks compute
        with may be known to the others by what lies behind the addresses, so it stays.
        """
        if self._num_ranks > 1:
            return torch.cuda.graph_pool_handle()
        with self._cache.use():
            torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
        return self._cache.id

    def on_reload(self, work: Callable[[], object]) -> None:
        """See `Memory.on_reload`."""
        self._on_reload = work

    def wait_for_weights(self, name: str) -> None:
        """Before a step uses weights that may be on their way still; see `Arriving.wait_for`."""
        self._arriving.wait_for(name)

    def prepare(self, level: SleepLevel, part: int, parts: int) -> None:
        """Keep a part of the weights; see `Memory.prepare`."""
        if part == 0:
            self._driver.enter()
            self._keeps_arena = level == 1 and (self._arena_is_kept or self._fits_host())
        if self._derived_copy is None:
            derived = list(self._derived.regions.values())
            self._derived_copy = HostCopy(self._driver, self._stream, derived, extents_of_regions(derived))
        self._derived_copy.make(part, parts)
        if self._keeps_arena:
            self._arena_copy = self._arena_copy or self._copy_of_arena()
            try:
                self._arena_copy.make(part, parts)
            except (CudaError, OSError) as error:
                print(f"firstlight: no copy of the weights in host memory: {error}", file=sys.stderr)
                self._keeps_arena = False

    def _fits_host(self) -> bool:
        """Whether the host has room for the weights; if not, level 2 is as near as one gets to level 1.

        Pages of files, which are room as long as they are not pinned, are none from then on.
        """
        needed = sum(arena.num_bytes for arena in self._arenas) + _HOST_RESERVE_BYTES
        return pinnable_bytes() // self._num_ranks > needed

    def _copy_of_arena(self) -> HostCopy:
        weights = self._weights
        if weights is None or self._on_reload is not None:
            # What was done with loaded weights is in no file.
            return HostCopy(self._driver, self._stream, self._arenas, extents_of_regions(self._arenas))
        extents = extents_of_plan(weights.plan, weights.address)
        files = LoadedFiles(weights.stamps, weights.gate)
        return HostCopy(self._driver, self._stream, self._arenas, extents, files)

    def give_back(self, level: SleepLevel) -> None:
        """See `Memory.give_back`."""
        torch.cuda.synchronize()
        self._arena_is_kept = level == 1 and self._keeps_arena
        if not self._arena_is_kept and self._arena_copy is not None:
            self._arena_copy.close()
            self._arena_copy = None
        for region in self._regions():
            region.give_back()
        torch.cuda.empty_cache()

    def tidy(self) -> None:
        """See `Memory.tidy`.

        The driver clears what it was given back by and by, and with the first allocation after that it looks
        through all of it: measured, 30 to 48 ms for a GPU's whole memory, where others take less than one.
        """
        with suppress(CudaError):
            VirtualMemory(self._driver, 1).close()

    def take_back(self) -> None:
        """See `Memory.take_back`.

        Raises `CudaError` if the memory is not to be had any more, and `ChangedFiles`.
        """
        self._driver.enter()
        try:
            self._take()
        except CudaError as error:
            free, total = self._driver.memory()
            raise CudaError(
                f"The engine cannot wake. {error} Of the device's {total / 1e9:.1f} GB {free / 1e9:.1f} are "
                "free: whatever else uses it must leave the engine the room that it had."
            ) from None
        if self._weights is not None and not self._arena_is_kept:
            self._weights.load(lambda done: None)
            self.wait_for_weights("")
            if self._on_reload is not None:
                self._on_reload()

    def _take(self) -> None:
        """All memory; what was copied is on its way back while the rest is being mapped."""
        assert self._derived_copy is not None
        # A few megabytes, mostly, that are used everywhere.
        filled = self._derived_copy.fill()
        if self._arena_copy is not None:
            filled = self._arena_copy.fill() or filled
        for arena in self._arenas:
            arena.take()
        self._arriving.begin(filled, self._weights)
        for region in self._scratch.regions.values():
            region.take()
            self._driver.clear(region.address, region.num_bytes, self._clearing)
        for region in self._cache.regions.values():
            region.take()
        # What lies there is not only used by steps, and soon done.
        self._driver.synchronize(self._clearing)

    def _regions(self) -> list[VirtualMemory]:
        pools = (self._derived, self._cache, self._scratch)
        return [*self._arenas, *(region for pool in pools for region in pool.regions.values())]
