"""A group of GPUs that write into each other's memory.

Sums, and the logits of few rows, are kernels of our own (`kernels/gpu/all_reduce.py`); what is left goes
through NCCL, which makes no connections before it is needed. Memory is shared by the driver's handles for
other processes of the same host (CUDA Driver API, "CUDA IPC"), which travel over the control lines.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from runtime.errors import FirstlightError
from runtime.kernels.adopted import adopted
from runtime.kernels.gpu.all_reduce import gather, one_shot, two_shot
from runtime.kernels.gpu.inboxes import (
    Inboxes,
    fill_with_marks,
    gather_blocks,
    gather_elements,
    one_shot_elements,
    two_shot_elements,
)
from runtime.kernels.gpu.prefetch import can_prefetch
from runtime.kernels.linear import Product
from runtime.parallel.group import Group
from runtime.parallel.halves import Copies, Half, HalfMemory
from runtime.parallel.ranks import Ranks

# Up to here every rank reads everyone's rows; beyond, each row is added up by one rank for all.
ONE_SHOT_ROWS = 32
# Longer sums are cut into pieces of so many rows, which is what the inboxes are made for.
TWO_SHOT_ROWS = 2048
# The halves of a long step have at most so many rows.
HALF_ROWS = 4096
# Of so many rows the logits are gathered in the same way.
GATHERED_ROWS = 16
# Our own products, of fewer rows, gain nothing by it; those of more rows wait for more than weights.
_PREFETCH_ROWS = range(9, 257)
_LAZY_PEER_ACCESS = 1


class Driver(Protocol):
    """What is needed of `weights.cuda_driver.Driver`."""

    def allocate(self, num_bytes: int) -> int: ...
    def call(self, name: str, *arguments: object) -> None: ...


class _Handle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = [("reserved", ctypes.c_char * 64)]


class PeerGroup(Group):
    """A `Group` on GPUs of one host."""

    def __init__(self, backend: Any, ranks: Ranks, driver: Driver) -> None:
        super().__init__(backend, ranks)
        self._driver = driver
        self.few: Inboxes | None = None
        self.many: Inboxes | None = None
        self.rows: Inboxes | None = None
        self._prefetches = can_prefetch()

    def prepare(self, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> None:
        """See `Group.prepare`. Where GPUs cannot reach each other's memory, all is left to NCCL."""
        if dtype.itemsize != 2:
            return
        world_size, share = self.world_size, -(-vocab_size // self.world_size)
        many = TWO_SHOT_ROWS // world_size * world_size
        sizes = (
            2 * one_shot_elements(world_size, ONE_SHOT_ROWS, hidden_size),
            2 * two_shot_elements(many, hidden_size),
            *[HalfMemory.num_bytes(world_size, HALF_ROWS, hidden_size)] * 2,
            4 * gather_elements(world_size, GATHERED_ROWS, share),
        )
        addresses = self._share(sizes)
        if addresses is None:
            return
        self.few = self._inboxes(addresses[0], ONE_SHOT_ROWS, ONE_SHOT_ROWS, hidden_size)
        self.many = self._inboxes(addresses[1], many, many, hidden_size)
        blocks = gather_blocks(GATHERED_ROWS, share)
        self.rows = self._inboxes(addresses[4], GATHERED_ROWS, blocks, share)
        wire = Copies(self._driver)
        first, second = (
            HalfMemory(each, adopted(each[self.rank], sizes[2]), self.rank, HALF_ROWS, hidden_size, dtype)
            for each in addresses[2:4]
        )
        self.halves = Half(wire, first), Half(wire, second)

    def _inboxes(self, addresses: list[int], max_rows: int, num_turns: int, width: int) -> Inboxes:
        at = torch.tensor(addresses, dtype=torch.int64, device="cuda")
        turns = torch.zeros(num_turns, dtype=torch.int32, device="cuda")
        return Inboxes(at, turns, self.rank, max_rows, width)

    def _share(self, sizes: Sequence[int]) -> list[list[int]] | None:
        """Memory of these sizes in bytes, full of marks: where each lies on every rank; None if it cannot be.

        All but the last hold 16-bit numbers.
        """
        starts = [sum(sizes[:place]) for place in range(len(sizes))]
        own = self._driver.allocate(sum(sizes))
        memory = adopted(own, sum(sizes))
        fill_with_marks(memory[: starts[-1]].view(torch.float16))
        fill_with_marks(memory[starts[-1] :].view(torch.float32))
        torch.cuda.synchronize()
        handle, problem, addresses = _Handle(), "", [0] * self.world_size
        try:
            self._driver.call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(own))
        except FirstlightError as error:
            problem = str(error)
        handles = self._ranks.control.exchange(bytes(handle))
        try:
            addresses = [
                own if rank == self.rank else self._open(other) for rank, other in enumerate(handles)
            ]
        except FirstlightError as error:
            problem = problem or str(error)
        problems = [one for one in self._ranks.control.exchange(problem) if one]
        if problems and self.rank == 0:
            print(f"firstlight: no memory is shared, sums go through NCCL: {problems[0]}", file=sys.stderr)
        return None if problems else [[address + start for address in addresses] for start in starts]

    def _open(self, handle: bytes) -> int:
        """The address, for this process, of another's memory."""
        address = ctypes.c_uint64()
        self._driver.call(
            "cuIpcOpenMemHandle_v2",
            ctypes.byref(address),
            _Handle.from_buffer_copy(handle),
            ctypes.c_uint(_LAZY_PEER_ACCESS),
        )
        return address.value

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See `Group.all_reduce`."""
        rows = x.shape[0]
        if self.few is None or self.many is None or x.shape[-1] != self.few.width:
            return super().all_reduce(x)
        if rows <= ONE_SHOT_ROWS:
            return one_shot(x, self.few, x) if rows else x
        step = self.many.max_rows
        for start in range(0, rows, step):
            two_shot(x[start : start + step], self.many, x[start : start + step])
        return x

    def add_rms_norm(
        self,
        x: torch.Tensor | Product,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        upcoming: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Group.add_rms_norm`. Of many rows, this rank's residual holds only some; see `whole`."""
        rows = residual.shape[0]
        if self.few is None or self.many is None or not rows:
            return super().add_rms_norm(x, residual, weight, eps)
        sent = isinstance(x, Product) and x.send(self.few)
        part = None if sent else x.compute() if isinstance(x, Product) else x
        out = torch.empty_like(residual)
        if rows not in _PREFETCH_ROWS or not self._prefetches:
            upcoming = None
        if rows <= ONE_SHOT_ROWS:
            return one_shot(part, self.few, out, (residual, weight, eps), upcoming)
        assert part is not None
        step = self.many.max_rows
        for start in range(0, rows, step):
            some = slice(start, start + step)
            two_shot(part[some], self.many, out[some], (residual[some], weight, eps), upcoming)
        return out

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """See `Group.all_gather`."""
        rows, width = x.shape
        if self.rows is None or not 0 < rows <= GATHERED_ROWS or width != self.rows.width:
            return super().all_gather(x)
        return gather(x.contiguous(), self.rows, x.new_empty((rows, width * self.world_size)))

    def whole(self, residual: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """See `Group.whole`."""
        if self.many is None or residual.shape[0] <= ONE_SHOT_ROWS:
            return residual[rows]
        ours = rows % self.many.max_rows % self.world_size == self.rank
        return self.all_reduce(residual[rows].masked_fill_(~ours[:, None], 0.0))
