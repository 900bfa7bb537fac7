"""What a sequence's grammar lets it say next."""

from __future__ import annotations

import os
from collections.abc import Callable
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING

import torch

from runtime.engine.step import TokenMasks

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from llguidance import LLExecutor

    from runtime.engine.compilations import Copy
    from runtime.engine.sequence import Sequence


class Constraint:
    """Where one sequence stands in its grammar.

    `complete` says that nothing can follow the tokens that it has; `spent`, that nothing may follow them as
    the request has it, which shows only in a mask: the next token is void.
    `problem` says why the grammar cannot be followed any further, if that is so.
    """

    __slots__ = ("complete", "copy", "field", "matcher", "problem", "spent")

    def __init__(self, copy: Copy, field: str) -> None:
        self.copy = copy
        self.matcher = copy.matcher
        self.field = field
        self.complete = False
        self.spent = False
        self.problem: str | None = None

    def accept(self, token_id: int) -> None:
        """Go on by a token, as drawn from what the mask leaves."""
        if not self.matcher.consume_token(token_id):
            self.problem = (
                f"'{self.field}' cannot be followed any further: no token is left that it allows and that "
                "'bad_words' or 'logit_bias' do not rule out."
            )
        self.complete = self.matcher.is_stopped()


class Masks:
    """Computes the masks of a step's constrained sequences, all at once, in memory that steps reuse.

    The memory may be written anew when the step that it was filled for is through.
    """

    def __init__(self, max_rows: int, vocab_size: int, pinned: bool) -> None:
        """`pinned` memory is what a GPU copies from without waiting."""
        self._shape = (max_rows, vocab_size // 32 + 1)  # with the bit for the end, see `vocabulary.py`
        self._end = divmod(vocab_size, 32)
        self._pinned = pinned
        self._bits: torch.Tensor | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._executor: LLExecutor | None = None

    def begin(self, held: Rows[Sequence]) -> Callable[[], TokenMasks | None]:
        """Begin to compute the masks of those sequences, which all have a grammar, that go on.

        What this returns waits for them; it returns None if there are none.
        """
        rows = [sequence for sequence in held if not sequence.ended]
        if not rows:
            return lambda: None
        if self._bits is None or self._thread is None:
            from concurrent.futures import ThreadPoolExecutor

            self._thread = ThreadPoolExecutor(1, "masks")
            self._bits = torch.empty(self._shape, dtype=torch.int32, pin_memory=self._pinned)
        bits = self._bits[: len(rows)]
        done = self._thread.submit(self._fill, [s.constraint for s in rows if s.constraint is not None], bits)
        return lambda: self._finish(rows, bits, done)

    def _fill(self, constraints: list[Constraint], bits: torch.Tensor) -> None:
        """One row for each, side by side, from the first to the last without Python's lock."""
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor(_num_threads())
        # Those that share a lock one after the other, most likely by the same thread.
        rows = sorted(enumerate(constraints), key=lambda numbered: numbered[1].copy.group)
        matchers = [(constraint.matcher, row) for row, constraint in rows]
        num_rows, num_words = bits.shape
        self._executor.unsafe_compute_mask_ptr(matchers, bits.data_ptr(), num_words * bits.itemsize, num_rows)

    def _finish(self, rows: list[Sequence], bits: torch.Tensor, done: Future[None]) -> TokenMasks | None:
        done.result()
        word, place = self._end
        may_end = (bits[:, word] >> place & 1).tolist()
        # Where nothing may follow, the next token is void, and needs no mask.
        kept = [i for i, row in enumerate(rows) if not may_end[i] or self._let_end(bits[i], row)]
        if len(kept) < len(rows):
            bits, rows = bits[kept], [rows[index] for index in kept]
        return TokenMasks(rows, bits) if rows else None

    def _let_end(self, bits: torch.Tensor, sequence: Sequence) -> bool:
        """Add the tokens that end the sequence to a mask; False if nothing may follow."""
        constraint = sequence.constraint
        assert constraint is not None
        if len(sequence.token_ids) - sequence.num_prompt >= sequence.sampling.min_tokens:
            for token_id in sequence.stop_token_ids:
                bits[token_id // 32] |= _BITS[token_id % 32]
        word, place = self._end
        bits[word] &= ~_BITS[place]
        # A matcher that has failed says that this is the end.
        constraint.spent = constraint.matcher.is_error() or not bits.any()
        if constraint.matcher.is_error():
            reason = constraint.matcher.get_error()
            constraint.problem = f"'{constraint.field}' takes too much to follow: {reason}"
        return not constraint.spent


def _num_threads() -> int:
    """As many as leave cores for the step loop, and for the handler and whoever else there is."""
    return max(1, len(os.sched_getaffinity(0)) * 3 // 4)


# Each bit of a word, as int32.
_BITS = [1 << place if place < 31 else -(1 << 31) for place in range(32)]
