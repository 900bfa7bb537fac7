"""Token masks, one bit a token: what the CPU applies, and the twin of the GPU's kernel."""

from __future__ import annotations

import numpy as np
import torch


def apply_mask(logits: torch.Tensor, bits: torch.Tensor) -> None:
    """Rule tokens out in place: logits [vocab_size] become -inf where a bit is clear.

    bits [W] int32, of which the lowest bit of the first word stands for token 0; W * 32 >= vocab_size.
    """
    allowed = np.unpackbits(bits.numpy().view(np.uint8), bitorder="little", count=logits.shape[0])
    logits.masked_fill_(torch.from_numpy(allowed == 0), -torch.inf)
