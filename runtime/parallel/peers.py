"""A group of GPUs that write into each other's memory.

Sums of few rows, which decode steps consist of, and of many, are kernels of our own (`kernels/gpu/
all_reduce.py`); what is left goes through NCCL. Memory is shared by the driver's handles for other processes
of the same host (CUDA Driver API, "CUDA IPC"), which travel over the control lines.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any, Protocol

import torch

from runtime.errors import FirstlightError
from runtime.kernels.adopted import adopted
from runtime.kernels.gpu.all_reduce import (
    Inboxes,
    fill_with_marks,
    one_shot,
    one_shot_elements,
    two_shot,
    two_shot_elements,
)
from runtime.parallel.group import Group
from runtime.parallel.ranks import Ranks

# Up to here every rank reads everyone's rows; beyond, each row is added up by one rank for all.
ONE_SHOT_ROWS = 32
# Longer sums are cut into pieces of so many rows, which is what the inboxes are made for.
TWO_SHOT_ROWS = 2048
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
        super().__init__(backend, ranks.rank, ranks.world_size)
        self._ranks = ranks
        self._driver = driver
        self.few: Inboxes | None = None
        self.many: Inboxes | None = None

    def prepare(self, hidden_size: int, dtype: torch.dtype) -> None:
        """See `Group.prepare`. Where GPUs cannot reach each other's memory, all is left to NCCL."""
        if dtype.itemsize != 2:
            return
        few, many = ONE_SHOT_ROWS, TWO_SHOT_ROWS // self.world_size * self.world_size
        sizes = [
            one_shot_elements(self.world_size, few, hidden_size),
            two_shot_elements(many, hidden_size),
        ]
        addresses = self._share(2 * sum(sizes), dtype)
        if addresses is None:
            return
        self.few, self.many = (
            Inboxes(
                torch.tensor([address + offset for address in addresses], dtype=torch.int64, device="cuda"),
                torch.zeros(rows, dtype=torch.int32, device="cuda"),
                self.rank,
                rows,
                hidden_size,
                dtype,
            )
            for rows, offset in ((few, 0), (many, 2 * sizes[0]))
        )

    def _share(self, num_bytes: int, dtype: torch.dtype) -> list[int] | None:
        """Memory of this size on each rank, full of marks: where it lies, by rank; None if it cannot be."""
        own = self._driver.allocate(num_bytes)
        fill_with_marks(adopted(own, num_bytes).view(dtype))
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
        return None if problems else addresses

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
        if self.few is None or self.many is None or x.shape[-1] != self.few.hidden_size:
            return super().all_reduce(x)
        if rows <= ONE_SHOT_ROWS:
            return one_shot(x, self.few, x) if rows else x
        step = self.many.max_rows
        for start in range(0, rows, step):
            two_shot(x[start : start + step], self.many, x[start : start + step])
        return x

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """See `Group.add_rms_norm`. Of many rows, this rank's residual holds only some; see `whole`."""
        rows = x.shape[0]
        if self.few is None or self.many is None or not rows:
            return super().add_rms_norm(x, residual, weight, eps)
        out = torch.empty_like(x)
        if rows <= ONE_SHOT_ROWS:
            return one_shot(x, self.few, out, (residual, weight, eps))
        step = self.many.max_rows
        for start in range(0, rows, step):
            part = slice(start, start + step)
            two_shot(x[part], self.many, out[part], (residual[part], weight, eps))
        return out

    def whole(self, residual: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """See `Group.whole`."""
        if self.many is None or residual.shape[0] <= ONE_SHOT_ROWS:
            return residual[rows]
        ours = rows % self.many.max_rows % self.world_size == self.rank
        return self.all_reduce(residual[rows].masked_fill_(~ours[:, None], 0.0))
