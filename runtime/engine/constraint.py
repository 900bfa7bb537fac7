"""What a sequence's grammar lets it say next."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING

import torch

from runtime.engine.step import TokenMasks

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from llguidance import LLExecutor, LLMatcher

    from runtime.engine.sequence import Sequence


class Constraint:
    """Where one sequence stands in its grammar; `lane` is its matcher's, see `engine/grammar.py`.

    `complete` says that nothing can follow the tokens that it has; `spent`, that nothing may follow them as
    the request has it, which shows only in a mask: the next token is void.
    `problem` says why the grammar cannot be followed any further, if that is so.
    """

    __slots__ = ("complete", "field", "lane", "matcher", "problem", "spent")

    def __init__(self, matcher: LLMatcher, lane: int, field: str) -> None:
        self.matcher = matcher
        self.lane = lane
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
        self._threads: ThreadPoolExecutor | None = None
        self._executors: dict[int, LLExecutor] = {}

    def begin(self, held: Rows[Sequence]) -> Callable[[], TokenMasks | None]:
        """Begin to compute the masks of those sequences, which all have a grammar, that go on.

        What this returns waits for them; it returns None if there are none.
        """
        rows = [sequence for sequence in held if not sequence.ended]
        bits, lanes = self._begin([s.constraint for s in rows if s.constraint is not None])
        return lambda: self._finish(rows, bits, lanes)

    def _begin(self, constraints: list[Constraint]) -> tuple[torch.Tensor, list[Future[None]]]:
        """One row for each: lane beside lane, each from its beginning to its end without Python's lock."""
        if self._bits is None or self._threads is None:
            from concurrent.futures import ThreadPoolExecutor

            self._threads = ThreadPoolExecutor(thread_name_prefix="masks")
            self._bits = torch.empty(self._shape, dtype=torch.int32, pin_memory=self._pinned)
        bits = self._bits[: len(constraints)]
        lanes: dict[int, list[tuple[LLMatcher, int]]] = {}
        for row, constraint in enumerate(constraints):
            lanes.setdefault(constraint.lane, []).append((constraint.matcher, row))
        submit = self._threads.submit
        return bits, [submit(self._fill, lane, matchers, bits) for lane, matchers in lanes.items()]

    def _finish(
        self, rows: list[Sequence], bits: torch.Tensor, lanes: list[Future[None]]
    ) -> TokenMasks | None:
        for lane in lanes:
            lane.result()
        word, place = self._end
        may_end = (bits[:, word] >> place & 1).tolist()
        # Where nothing may follow, the next token is void, and needs no mask.
        kept = [i for i, row in enumerate(rows) if not may_end[i] or self._let_end(bits[i], row)]
        if len(kept) < len(rows):
            bits, rows = bits[kept], [rows[index] for index in kept]
        return TokenMasks(rows, bits) if rows else None

    def _fill(self, lane: int, matchers: list[tuple[LLMatcher, int]], bits: torch.Tensor) -> None:
        if lane not in self._executors:
            from llguidance import LLExecutor

            self._executors[lane] = LLExecutor(1)
        num_rows, num_words = bits.shape
        self._executors[lane].unsafe_compute_mask_ptr(
            matchers, bits.data_ptr(), num_words * bits.itemsize, num_rows
        )

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


# Each bit of a word, as int32.
_BITS = [1 << place if place < 31 else -(1 << 31) for place in range(32)]
