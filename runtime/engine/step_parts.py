"""A step with prompts in it as a packed batch, or as two: what the model is told of the prompts."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from runtime.engine.scheduler import Scheduled
from runtime.kernels.gpu.attention_prefill import prefill_work_items

# Halves of shorter steps would lose more in their products than they gain in sums that nobody waits for.
MIN_ROWS_IN_HALVES = 2048
PART_ARRAYS = 5
# Kernels are compiled for lists that begin at multiples of 16 bytes.
_ALIGNED_TOKENS = 16


@dataclass(frozen=True, slots=True)
class StepPart:
    """Some of a step's tokens, from `start` on: those of decoding sequences, then those of prompts."""

    start: int
    num_decodes: int
    prompts: Rows[Scheduled] = ()

    @property
    def stop(self) -> int:
        """Where its tokens end."""
        return self.start + self.num_decodes + sum(item.num_new for item in self.prompts)

    def halves(self) -> list[StepPart]:
        """The same in two parts of like size; a prompt may be cut, its second piece coming after the first.

        There are more prompt tokens than decodes, and many.
        """
        room = (self.stop - self.start) // (2 * _ALIGNED_TOKENS) * _ALIGNED_TOKENS - self.num_decodes
        first: list[Scheduled] = []
        second: list[Scheduled] = []
        for item in self.prompts:
            taken = min(room, item.num_new)
            room -= taken
            if taken == item.num_new:
                first.append(item)
                continue
            if taken:
                first.append(replace(item, num_new=taken, samples=False))
            second.append(replace(item, start=item.start + taken, num_new=item.num_new - taken))
        head = StepPart(self.start, self.num_decodes, first)
        return [head, StepPart(head.stop, 0, second)]

    def arrays(self, tile: int) -> list[npt.ArrayLike]:
        """`query_start`, the prompts' `seq_lens` and `table_rows`, `work_items` and `logits_rows` of a
        `DeviceBatch`; `tile` is how many tokens a work item takes."""
        counts = [item.num_new for item in self.prompts]
        lengths = [item.start + item.num_new for item in self.prompts]
        ends = np.cumsum([self.num_decodes, *counts])
        return [
            ends,
            lengths,
            [item.sequence.slot for item in self.prompts],
            prefill_work_items(counts, lengths, tile),
            [*range(self.num_decodes), *self._logits_rows(ends)],
        ]

    def _logits_rows(self, ends: npt.NDArray[np.int64]) -> list[int]:
        """The tokens after which logits are wanted: the last of each that samples, all of a scored prompt."""
        rows: list[int] = []
        for item, end in zip(self.prompts, ends[1:].tolist(), strict=True):
            if item.scores_prompt:
                rows.extend(range(end - item.num_new, end))
            elif item.samples:
                rows.append(end - 1)
        return rows
