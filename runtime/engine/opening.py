"""What the first products on a GPU wait for, done while the rest of a start goes on.

Torch's own entry to the device, the library of matrix products and its kernels for the model's shapes take
longer to get ready than a first token takes to compute. All of it waits in the driver, not for Python's lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch

# As many as the canary's prompt has.
_NUM_ROWS = 64


class Opening(threading.Thread):
    """Computes products of a few rows with whatever is in the weights' memory so far.

    `weights` waits until that memory is there; it returns None if nothing comes of it.
    """

    def __init__(self, weights: Callable[[], Mapping[str, tuple[torch.Tensor, ...]] | None]) -> None:
        super().__init__(name="opening", daemon=True)
        self._weights = weights

    @torch.inference_mode()
    def run(self) -> None:
        """The thread's work."""
        layers = [
            part
            for name, parts in (self._weights() or {}).items()
            for part in parts
            if name.startswith("layers.") and part.ndim == 2
        ]
        for weight in {(part.dtype, *part.shape): part for part in layers}.values():
            if weight.dtype in (torch.float16, torch.bfloat16):
                torch.mm(weight.new_empty((_NUM_ROWS, weight.shape[1])), weight.t())
