"""The masks of a step's constrained sequences, computed beside whatever else goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from collections.abc import Sequence as Rows
from operator import itemgetter
from typing import TYPE_CHECKING

import torch

from runtime.engine.grammar.constraint import Constraint
from runtime.engine.grammar.token_rules import BITS, mask_words
from runtime.engine.step import TokenMasks

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from llguidance import LLExecutor, LLMatcher

    from runtime.engine.sequence import Sequence


class Masks:
    """Computes masks in memory that steps reuse.

    The memory may be written anew when the step that it was filled for is through.
    """

    def __init__(self, max_rows: int, vocab_size: int, pinned: bool) -> None:
        """`pinned` memory is what a GPU copies from without waiting."""
        self._shape = (max_rows, mask_words(vocab_size))
        self._end = divmod(vocab_size, 32)
        self._pinned = pinned
        self._bits: torch.Tensor | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._executor: LLExecutor | None = None

    def begin(self, sequences: Rows[Sequence]) -> Callable[[], TokenMasks | None]:
        """Begin to compute the masks of those sequences, which all have a constraint, that go on.

        What this returns waits for them; it returns None if there are none.
        """
        rows = [(s, s.constraint) for s in sequences if s.constraint is not None and not s.ended]
        if not rows:
            return lambda: None
        if self._bits is None:
            self._bits = torch.empty(self._shape, dtype=torch.int32, pin_memory=self._pinned)
        bits = self._bits[: len(rows)]
        free = [index for index, (_, constraint) in enumerate(rows) if constraint.copy is None]
        if free:
            bits[free] = self._anything()
        held = [
            (one.copy.matcher, one.copy.group, index)
            for index, (_, one) in enumerate(rows)
            if one.copy is not None
        ]
        # Those that share a lock one after the other, most likely by the same thread.
        held.sort(key=itemgetter(1))
        matchers = [(matcher, index) for matcher, _, index in held]
        done = self._compute(matchers, bits) if matchers else None
        return lambda: self._finish(rows, bits, done)

    def _anything(self) -> torch.Tensor:
        """The mask of a sequence without a grammar: every token, and no end."""
        bits = torch.full(self._shape[1:], -1, dtype=torch.int32)
        word, place = self._end
        bits[word] &= ~BITS[place]
        return bits

    def _compute(self, matchers: list[tuple[LLMatcher, int]], bits: torch.Tensor) -> Future[None]:
        """Each one's mask to its row, all of them without Python's lock."""
        if self._executor is None or self._thread is None:
            from concurrent.futures import ThreadPoolExecutor

            from llguidance import LLExecutor

            self._thread = ThreadPoolExecutor(1, "masks")
            self._executor = LLExecutor(_num_threads())
        num_rows, num_words = bits.shape
        return self._thread.submit(
            self._executor.unsafe_compute_mask_ptr,
            matchers,
            bits.data_ptr(),
            num_words * bits.itemsize,
            num_rows,
        )

    def _finish(
        self, rows: list[tuple[Sequence, Constraint]], bits: torch.Tensor, done: Future[None] | None
    ) -> TokenMasks | None:
        if done is not None:
            done.result()
        word, place = self._end
        may_end = (bits[:, word] >> place & 1).tolist()
        # Where nothing may follow, the next token is void, and needs no mask.
        kept = [
            index
            for index, (sequence, constraint) in enumerate(rows)
            if not (may_end[index] or constraint.rules is not None)
            or constraint.narrow(bits[index], sequence, self._end if may_end[index] else None)
        ]
        sequences = [rows[index][0] for index in kept]
        return TokenMasks(sequences, bits if len(kept) == len(rows) else bits[kept]) if kept else None


def _num_threads() -> int:
    """As many as leave cores for the step loop, and for the handler and whoever else there is."""
    return max(1, len(os.sched_getaffinity(0)) * 3 // 4)
