"""Torch's entry to a GPU, and those of its kernels that a first step needs, beside the rest of a start.

All of the waiting is done in the driver, not for Python's lock.
"""

from __future__ import annotations

import threading

import torch


class Opening(threading.Thread):
    """Does once, to nothing in particular, what building an engine and computing a first step do."""

    def __init__(self) -> None:
        super().__init__(name="opening", daemon=True)

    @torch.inference_mode()
    def run(self) -> None:
        """The thread's work."""
        words = torch.zeros((4, 16), dtype=torch.int32, device="cuda")
        rows = words[0, :1]
        words[rows] = words[1:2]
        torch.cat((rows, rows))
        torch.full((1,), -1, dtype=torch.int32, device="cuda")
        for dtype in (torch.bfloat16, torch.float16):
            x = torch.zeros((4, 16), dtype=dtype, device="cuda")
            angles = x[rows].float() * x[:1].float()
            torch.cat((torch.stack((angles.cos(), angles.sin()), dim=1),)) * 1.0
        torch.arange(4, dtype=torch.float32, device="cuda")
