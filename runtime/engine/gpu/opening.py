"""Torch's entry to a GPU, and those of its kernels that a first step needs, beside the rest of a start.

All of the waiting is done in the driver, not for Python's lock.
"""

from __future__ import annotations

import threading

import torch

from runtime.model.config import RopeConfig
from runtime.model.rope import cos_sin_table


class Opening(threading.Thread):
    """Does once, to nothing in particular, what building an engine and computing a first step do."""

    def __init__(self) -> None:
        super().__init__(name="opening", daemon=True)

    @torch.inference_mode()
    def run(self) -> None:
        """The thread's work."""
        if torch.version.cuda is None:
            return  # who builds the engine says what is to be done about that
        rows, words, numbers = (
            torch.zeros((4, 4)[:axes], dtype=dtype, device="cuda")
            for axes, dtype in ((1, torch.int32), (2, torch.int32), (2, torch.float32))
        )
        words[rows[:1]] = torch.full((1, 4), -1, dtype=torch.int32, device="cuda")
        torch.cat((rows, rows))
        for dtype in (torch.bfloat16, torch.float16):
            x = torch.zeros((4, 4), dtype=dtype, device="cuda")
            numbers = x[rows].float() + numbers[rows] + rows[rows]
        cos_sin_table(RopeConfig(theta=10_000.0, rotary_dim=4), 4, "cuda")
