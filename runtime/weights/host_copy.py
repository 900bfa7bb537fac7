"""What device memory holds, in pinned host memory, from which the device is filled again at the link's speed.

Weights that lie on the device as they lie in their files are pinned where the page cache has them. Of all
else, and of files that are not in the page cache any more or were changed, a copy is made. Pinning is slow,
so all this happens in parts, whenever there is time, and some threads pin what the next parts take. What is
kept must not change on the device afterwards. The copy itself is read-only once it is made.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from runtime.weights.chunks import Chunk, chunks_of
from runtime.weights.cuda_driver import Driver
from runtime.weights.loaded_files import LoadedFiles
from runtime.weights.pinned import Pinned, pinned_memory, pinned_run
from runtime.weights.plan import MIN_PART_BYTES, Plan
from runtime.weights.virtual_memory import VirtualMemory

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

# What is pinned in one piece.
_EXTENT_BYTES = 64 << 20
# How many threads pin, and how many parts ahead of the one that is asked for.
_NUM_THREADS = 4
_PARTS_AHEAD = 8


class Extent(NamedTuple):
    """A run of device memory, and the run of a file that it holds, if it is known to hold one."""

    address: int
    num_bytes: int
    chunk: Chunk | None = None


class Filled(NamedTuple):
    """Extents up to an address are there when the event is done."""

    address: int
    event: ctypes.c_void_p


def extents_of_regions(regions: Sequence[VirtualMemory]) -> list[Extent]:
    """All that regions hold, whatever it is."""
    return [
        Extent(region.address + at, min(_EXTENT_BYTES, region.num_bytes - at))
        for region in regions
        for at in range(0, region.num_bytes, _EXTENT_BYTES)
    ]


def extents_of_plan(plan: Plan, arena: int) -> list[Extent]:
    """What an arena holds after its plan was run."""
    return [
        Extent(arena + chunk.target, chunk.num_bytes // chunk.pitch * chunk.width, chunk)
        for chunk in chunks_of(plan, _EXTENT_BYTES)
    ]


class HostCopy:
    """The content of some regions: their `extents`, with the `files` that chunks of these are of.

    It is made part by part, and good once every part was made. All copying is done on `stream`.
    """

    def __init__(
        self,
        driver: Driver,
        stream: ctypes.c_void_p,
        regions: Sequence[VirtualMemory],
        extents: Sequence[Extent],
        files: LoadedFiles | None = None,
    ) -> None:
        self._driver = driver
        self._stream = stream
        self._regions = regions
        self._extents = extents
        self._files = files
        self._parts: dict[int, _Part] = {}
        self._threads: ThreadPoolExecutor | None = None

    def make(self, part: int, parts: int) -> None:
        """Keep part number `part` of `parts`, unless that was done before.

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
        count = len(self._extents)
        extents = self._extents[count * part // parts : count * (part + 1) // parts]
        found = [(extent, self._descriptor(extent)) for extent in extents]
        return _Part(self._driver, self._stream, found, self._threads)

    def _descriptor(self, extent: Extent) -> int | None:
        """The open file of what can come from there again."""
        chunk = extent.chunk
        if chunk is None or self._files is None:
            return None
        # Copies of many narrow rows are slow.
        if chunk.width != chunk.pitch and chunk.width < MIN_PART_BYTES:
            return None
        return self._files.descriptor(chunk.file)

    def fill(self) -> list[Filled]:
        """Take the regions' memory, and begin to fill it; returns how that goes on, in the order of extents.

        Without a copy, only the memory is taken. Raises `ChangedFiles` if there is nothing to fill it with.
        """
        if self._files is not None:
            self._files.check()
        for region in self._regions:
            region.take()
        filled = []
        for _, part in sorted(self._parts.items()):
            end = 0
            for extent, address, is_as_in_file in part.kept():
                self._copy(extent, address, extent.chunk if is_as_in_file else None)
                end = max(end, extent.address + extent.num_bytes)
            if end:
                self._driver.record(part.filled, self._stream)
                filled.append(Filled(end, part.filled))
        return filled

    def _copy(self, extent: Extent, address: int, chunk: Chunk | None) -> None:
        """Begin to copy an extent from where its bytes lie close together, or as in the chunk of its file."""
        if chunk is None or chunk.width == chunk.pitch:
            self._driver.copy(extent.address, address, extent.num_bytes, self._stream)
        else:
            rows = chunk.num_bytes // chunk.pitch
            self._driver.copy_rows(
                extent.address, address + chunk.skip, chunk.width, rows, chunk.pitch, self._stream
            )

    def close(self) -> None:
        """Give back all that is kept."""
        self._end_threads()
        for part in self._parts.values():
            part.close()
        self._parts.clear()
        if self._files is not None:
            self._files.close()

    def _end_threads(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None


class _Part:
    """Some extents, which one of `threads` is pinning memory for; each comes with its open file or None."""

    def __init__(
        self,
        driver: Driver,
        stream: ctypes.c_void_p,
        extents: list[tuple[Extent, int | None]],
        threads: ThreadPoolExecutor,
    ) -> None:
        self._driver = driver
        self._stream = stream
        # Those that are in their files, and those that are copied, one after the other, to memory of our own.
        self._runs: list[tuple[Extent, Pinned]] = []
        self._copied: list[Extent] = []
        self._memory: Pinned | None = None
        self._is_made = False
        self.filled = driver.event()
        self._pinned: Future[None] = threads.submit(self._pin, extents)

    def _pin(self, extents: list[tuple[Extent, int | None]]) -> None:
        for extent, descriptor in extents:
            run, chunk = None, extent.chunk
            if chunk is not None and descriptor is not None:
                run = pinned_run(self._driver, descriptor, chunk.start, chunk.num_bytes)
            if run is not None:
                self._runs.append((extent, run))
            else:
                self._copied.append(extent)
        if self._copied:
            self._memory = pinned_memory(self._driver, sum(extent.num_bytes for extent in self._copied))

    def make(self) -> None:
        """Copy what is to be copied, unless that was done before; see `HostCopy.make`."""
        self._pinned.result()
        if self._memory is not None and not self._is_made:
            for extent, address, is_as_in_file in self.kept():
                if not is_as_in_file:
                    self._driver.download(address, extent.address, extent.num_bytes, self._stream)
            self._driver.synchronize(self._stream)
            self._memory.protect()
        self._is_made = True

    def kept(self) -> Iterator[tuple[Extent, int, bool]]:
        """Each extent, where in host memory it begins, and whether it lies there as in its file."""
        for extent, run in self._runs:
            yield extent, run.address, True
        if self._memory is not None:
            address = self._memory.address
            for extent in self._copied:
                yield extent, address, False
                address += extent.num_bytes

    def close(self) -> None:
        """Give back the memory; no thread is at work on it any more."""
        for _, run in self._runs:
            run.close()
        self._runs.clear()
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        self._driver.destroy(self.filled)
