"""What the ranks of one engine compute together: sums and concatenations over all of them.

This is the plain way, through torch.distributed: gloo between CPUs, NCCL between GPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._C import _distributed_c10d as c10d

from runtime.kernels.norm import add_rms_norm


class Group:
    """One rank's end of the group. All ranks must call the same methods in the same order.

    `backend` is one of torch's process groups, used directly: nothing global is set up.
    """

    def __init__(self, backend: Any, rank: int, world_size: int) -> None:
        self.backend = backend
        self.rank = rank
        self.world_size = world_size
        self._sum, self._least = c10d.AllreduceOptions(), c10d.AllreduceOptions()
        self._sum.reduceOp = c10d.ReduceOp(c10d.ReduceOp.SUM)
        self._least.reduceOp = c10d.ReduceOp(c10d.ReduceOp.MIN)
        # On a GPU, in the stream that asks, so that there is nothing to wait for.
        self._sum.asyncOp = self._least.asyncOp = False

    def prepare(self, hidden_size: int, dtype: torch.dtype) -> None:
        """Get ready for sums of rows of that width; all ranks must do this together, before the first."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """x becomes the sum of all ranks' x, which have the same shape; returns it."""
        if x.numel():
            self._wait(self.backend.allreduce([x], self._sum))
        return x

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """As `kernels.norm.add_rms_norm` with the sum of all ranks' x; residual is the same everywhere."""
        return add_rms_norm(self.all_reduce(x), residual, weight, eps)

    def whole(self, residual: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of the residual stream, the same everywhere, after `add_rms_norm`; rows [R]."""
        return residual[rows]

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x [R, n] of each rank -> [R, world_size * n], rank by rank along the second axis."""
        rows, width = x.shape
        found = x.new_empty((self.world_size * rows, width))
        if x.numel():
            self._wait(self.backend._allgather_base(found, x.contiguous()))
        return found.view(self.world_size, rows, width).transpose(0, 1).reshape(rows, -1)

    def least(self, value: int) -> int:
        """The smallest of all ranks' values."""
        device = "cuda" if self.backend.name() == "nccl" else "cpu"
        held = torch.tensor([value], dtype=torch.int64, device=device)
        self._wait(self.backend.allreduce([held], self._least))
        return int(held.item())

    @staticmethod
    def _wait(work: c10d.Work | None) -> None:
        if work is not None:
            work.wait()
