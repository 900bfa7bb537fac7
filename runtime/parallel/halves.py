"""Sums over ranks of a long step, whose rows travel while another half of the step is computed.

A step's tokens are cut into two halves. When a half's product is done, the GPU's copy engines bring each rank
the rows that it adds up; it does that once the other half's next product is done, and the copy engines bring
everybody the results. So a sum takes the multiprocessors only as long as adding and norming its own rows do.

A copy of one number follows each copy of rows, over the same way and in order; who reads the rows waits for
that number, which is the count of the sums. Nothing is written before it has been read: a rank sends its next
rows only when it has everyone's results of the last ones, and results only when it has everyone's rows.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Protocol

import torch

from runtime.kernels.gpu.parts import add_parts, wait_for

# Counts begin anew after so many sums.
_COUNTS = 1 << 14
_FLAGS_BYTES = 256


class Driver(Protocol):
    """What is needed of `weights.cuda_driver.Driver`."""

    def call(self, name: str, *arguments: object) -> None: ...


class Wire(Protocol):
    """The way to other ranks' memory; `Copies` is the one between GPUs."""

    def begin(self) -> None: ...
    def copy(self, target: int, source: torch.Tensor, flag: int, count: int) -> None: ...


class Copies:
    """The stream whose copies go to other ranks' memory, in order, and the numbers that follow them."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._counts: torch.Tensor | None = None

    def begin(self) -> None:
        """Let what is copied from now on wait for what the device has been given to do so far."""
        if self._counts is None:
            # Not before the first long step comes: a start has other things to do.
            self._counts = torch.arange(_COUNTS, dtype=torch.int32, device="cuda")
        self._event.record()
        self._stream.wait_event(self._event)

    def copy(self, target: int, source: torch.Tensor, flag: int, count: int) -> None:
        """Copy contiguous rows to an address, then `count` to that of a flag."""
        assert self._counts is not None
        if source.numel():
            self._copy(target, source.data_ptr(), source.nbytes)
        self._copy(flag, self._counts.data_ptr() + 4 * count, 4)

    def _copy(self, target: int, source: int, num_bytes: int) -> None:
        self._driver.call(
            "cuMemcpyDtoDAsync_v2",
            ctypes.c_uint64(target),
            ctypes.c_uint64(source),
            ctypes.c_size_t(num_bytes),
            ctypes.c_void_p(self._stream.cuda_stream),
        )


@dataclass(frozen=True, slots=True)
class HalfMemory:
    """What one half needs of every rank's shared memory: where it begins, rank by rank, and this rank's own
    as bytes."""

    addresses: list[int]
    own: torch.Tensor
    rank: int
    max_rows: int
    hidden_size: int
    dtype: torch.dtype

    @staticmethod
    def num_bytes(world_size: int, max_rows: int, hidden_size: int) -> int:
        """Parts, results and flags."""
        return 2 * 2 * _padded(max_rows, world_size) * hidden_size + _FLAGS_BYTES

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return len(self.addresses)

    @property
    def share(self) -> int:
        """The most rows that one rank adds up."""
        return _padded(self.max_rows, self.world_size) // self.world_size

    def part(self, owner: int, sender: int) -> int:
        """Where a rank has the rows that another sent it."""
        return self.addresses[owner] + sender * self.share * self._row_bytes

    def result(self, rank: int, row: int) -> int:
        """Where a rank has a row of the result."""
        return self.addresses[rank] + (self.world_size * self.share + row) * self._row_bytes

    def flag(self, rank: int, kind: int, sender: int) -> int:
        """Where a rank sees how many parts (kind 0) or results (kind 1) have come from another."""
        return self.addresses[rank] + self._flags_at + 4 * (kind * self.world_size + sender)

    @property
    def _row_bytes(self) -> int:
        return 2 * self.hidden_size

    @property
    def _flags_at(self) -> int:
        return 2 * self.world_size * self.share * self._row_bytes

    def views(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """This rank's own: parts [world_size, share, hidden_size], results [rows, hidden_size] and flags
        [2, world_size]."""
        rows = self.own[: self._flags_at].view(self.dtype)
        flags = self.own[self._flags_at : self._flags_at + _FLAGS_BYTES].view(torch.int32)
        parts, results = rows.view(2, self.world_size * self.share, self.hidden_size)
        flags = flags[: 2 * self.world_size].view(2, self.world_size)
        return parts.view(self.world_size, self.share, self.hidden_size), results, flags


def _padded(max_rows: int, world_size: int) -> int:
    return -(-max_rows // world_size) * world_size


class Half:
    """The sums of one half, one after the other: `send`, then `settle`, then `received`.

    Rank r adds up the r-th share of the rows, and only its `residual` holds those afterwards.
    """

    def __init__(self, wire: Wire, memory: HalfMemory) -> None:
        self._wire = wire
        self._memory = memory
        self._parts, self._results, self._flags = memory.views()
        self._count = 0
        self._sent: torch.Tensor | None = None

    @property
    def max_rows(self) -> int:
        """The longest half."""
        return self._memory.max_rows

    @property
    def under_way(self) -> bool:
        """Whether there is something to `settle`."""
        return self._sent is not None

    def owned(self, num_rows: int, rank: int) -> slice:
        """The rows that a rank adds up."""
        share = -(-num_rows // self._memory.world_size)
        return slice(min(num_rows, rank * share), min(num_rows, (rank + 1) * share))

    def send(self, x: torch.Tensor) -> None:
        """Begin to send everyone the own part of the rows that are theirs; x [T, hidden_size]."""
        memory, rank = self._memory, self._memory.rank
        self._count = (self._count + 1) % _COUNTS
        self._wire.begin()
        for owner in self._others():
            rows = x[self.owned(len(x), owner)]
            self._wire.copy(memory.part(owner, rank), rows, memory.flag(owner, 0, rank), self._count)
        self._sent = x

    def settle(self, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        """Add up the own rows of what was sent to the residual, norm them, and begin to send the results."""
        assert self._sent is not None
        memory, rank = self._memory, self._memory.rank
        own = self.owned(len(residual), rank)
        wait_for(self._flags[0], self._count, rank)
        result = self._results[own]
        if len(result):
            add_parts(self._sent[own], self._parts, residual[own], weight, eps, result, rank)
        self._wire.begin()
        for other in self._others():
            self._wire.copy(memory.result(other, own.start), result, memory.flag(other, 1, rank), self._count)

    def received(self) -> torch.Tensor:
        """The normed rows, once all have come; they are overwritten by the next sum."""
        assert self._sent is not None
        wait_for(self._flags[1], self._count, self._memory.rank)
        num_rows, self._sent = len(self._sent), None
        return self._results[:num_rows]

    def own_of(self, residual: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of the residual stream, zeros where another rank has them; rows [R]."""
        own = self.owned(len(residual), self._memory.rank)
        theirs = (rows < own.start) | (rows >= own.stop)
        return residual[rows].masked_fill_(theirs[:, None], 0.0)

    def _others(self) -> list[int]:
        """The other ranks, each rank beginning with another, so that nobody gets everything at once."""
        size, rank = self._memory.world_size, self._memory.rank
        return [(rank + step) % size for step in range(1, size)]
