"""What the ranks of one engine compute together: sums and concatenations over all of them.

This is the plain way, through torch.distributed: gloo between CPUs, NCCL between GPUs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._C import _distributed_c10d as c10d

from runtime.kernels.linear import Product
from runtime.kernels.norm import add_rms_norm
from runtime.parallel.ranks import Ranks

if TYPE_CHECKING:
    from runtime.parallel.halves import Half


class Group:
    """One rank's end of the group. All ranks must call the same methods in the same order.

    `backend` is one of torch's process groups, used directly: nothing global is set up. `halves` is for the
    sums of long steps (`model/overlap.py`), None where all are done at once.
    """

    halves: tuple[Half, Half] | None = None

    def __init__(self, backend: Any, ranks: Ranks) -> None:
        self.backend = backend
        self.rank = ranks.rank
        self.world_size = ranks.world_size
        self._ranks = ranks
        self._sum = c10d.AllreduceOptions()
        # On a GPU, in the stream that asks, so that there is nothing to wait for.
        self._sum.asyncOp = False

    def prepare(self, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> None:
        """Get ready for a model of this size; all ranks must do this together, before anything else."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """x becomes the sum of all ranks' x, which have the same shape; returns it."""
        if x.numel():
            self._wait(self.backend.allreduce([x], self._sum))
        return x

    def add_rms_norm(
        self,
        x: torch.Tensor | Product,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        upcoming: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `kernels.norm.add_rms_norm` with the sum of all ranks' x; residual is the same everywhere.

        `upcoming` are weights that are read next; they may be fetched while the sum is under way.
        """
        part = x.compute() if isinstance(x, Product) else x
        return add_rms_norm(self.all_reduce(part), residual, weight, eps)

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
        return min(self._ranks.control.exchange(value))

    @staticmethod
    def _wait(work: c10d.Work | None) -> None:
        if work is not None:
            work.wait()
