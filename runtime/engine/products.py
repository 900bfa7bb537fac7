"""Loading what multiplies matrices, while the main thread still imports: cuBLAS takes 0.1 s for that."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

Weights = Mapping[str, tuple[torch.Tensor, ...]]


class ProductsLoader(threading.Thread):
    """Multiplies a few rows once with a matrix of each shape, whatever the matrices hold by then.

    What it loads stays loaded for all threads. Should something fail, it fails again where it is needed.
    """

    def __init__(self, weights: Callable[[], Weights], num_rows: int) -> None:
        super().__init__(name="products", daemon=True)
        self._weights = weights
        self._num_rows = num_rows

    @torch.inference_mode()
    def run(self) -> None:
        """The thread's work."""
        matrices = {
            (part.shape, part.dtype): part
            for parts in self._weights().values()
            for part in parts
            if part.dim() == 2 and part.dtype in (torch.bfloat16, torch.float16)
        }
        for matrix in matrices.values():
            F.linear(matrix.new_empty(self._num_rows, matrix.shape[1]), matrix)
        torch.cuda.current_stream().synchronize()
        # Those of this thread's stream, which nothing uses again.
        torch._C._cuda_clearCublasWorkspaces()
