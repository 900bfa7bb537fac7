"""What a step sends to the device: all its integers in one copy, from pinned memory, waited for by nobody."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

# Sections begin at multiples of this many words, which the kernels' widest loads are happy with.
_ALIGNMENT = 4
_MIN_WORDS = 1 << 16


class Staging:
    """A ring of pinned buffers and one buffer on the device, which each step overwrites.

    Steps run in order on one stream, so a step's kernels are done with the device's buffer before the
    next step's copy begins. A pinned buffer comes around again after `depth` steps; by then the copy out
    of it must be through, which holds if fewer steps than that are ever under way.
    """

    def __init__(self, device: torch.device, depth: int = 3) -> None:
        self._device = device
        self._depth = depth
        self._turn = 0
        self._allocate(_MIN_WORDS)

    def _allocate(self, num_words: int) -> None:
        self._pinned = [
            torch.empty(num_words, dtype=torch.int32, pin_memory=True) for _ in range(self._depth)
        ]
        self._words = torch.empty(num_words, dtype=torch.int32, device=self._device)

    def send(self, sections: Sequence[npt.ArrayLike]) -> list[torch.Tensor]:
        """Begin to copy a step's sections; returns each as a flat int32 tensor on the device."""
        arrays = [np.asarray(section, dtype=np.int32).reshape(-1) for section in sections]
        starts = []
        num_words = 0
        for array in arrays:
            starts.append(num_words)
            num_words += -(-len(array) // _ALIGNMENT) * _ALIGNMENT
        if num_words > len(self._words):
            torch.cuda.current_stream().synchronize()
            self._allocate(2 * num_words)
        self._turn = (self._turn + 1) % self._depth
        pinned = self._pinned[self._turn]
        host = pinned.numpy()
        for array, start in zip(arrays, starts, strict=True):
            host[start : start + len(array)] = array
        self._words[:num_words].copy_(pinned[:num_words], non_blocking=True)
        return [self._words[start : start + len(array)] for array, start in zip(arrays, starts, strict=True)]


def to_device(values: Sequence[int]) -> torch.Tensor:
    """Begin to copy a few more integers, for steps with unusual wishes; [N] int32 on the device."""
    return torch.tensor(values, dtype=torch.int32, pin_memory=True).to("cuda", non_blocking=True)
