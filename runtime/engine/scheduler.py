"""Continuous batching: which sequences compute how many tokens in the next step.

There are no phases. Every step spends one budget of tokens on sequences whose computed tokens lag
behind their tokens: running ones first, oldest first, then waiting ones, in the order of their
priorities, as far as blocks allow. A decode is a lag of one, a prefill a longer lag, cut into chunks
where the budget ends. When blocks run out, the youngest sequence gives up its own and is computed again
later; the oldest can always go on, so everyone ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from runtime.engine.blocks import BlockManager
from runtime.engine.sequence import Sequence

# Logits of every prompt position are wide; a request that wants them gets its prompt in chunks of this.
PROMPT_LOGPROBS_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`num_new` tokens of `sequence`, from `start` on, are computed in this step.

    `samples` says that they reach the sequence's end, so that its next token is sampled; `decodes`, that
    the one new token was itself sampled in the sequence's present slot; `admitted`, that the slot is new;
    `scores_prompt`, that the log probabilities of prompt tokens are wanted from it.
    """

    sequence: Sequence
    start: int
    num_new: int
    samples: bool
    decodes: bool = False
    admitted: bool = False
    scores_prompt: bool = False


class Scheduler:
    """Decides what each step computes. Deterministic: the same calls give the same steps."""

    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_chunked_prefill: bool = True,
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enable_chunked_prefill = enable_chunked_prefill
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        """Whether any sequence is waiting or running."""
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind all that wait with its priority, or a lower number."""
        place = len(self.waiting)
        while place and self.waiting[place - 1].priority > sequence.priority:
            place -= 1
        self.waiting.insert(place, sequence)

    def remove(self, request_ids: Iterable[str]) -> None:
        """Forget sequences, wherever they stand, and free their blocks; unknown ids are ignored."""
        gone = set(request_ids)
        for sequence in self.running:
            if sequence.request_id in gone:
                sequence.ended = True
                self._give_up_place(sequence)
        self.running = [sequence for sequence in self.running if sequence.request_id not in gone]
        if any(sequence.request_id in gone for sequence in self.waiting):
            for sequence in self.waiting:
                sequence.ended = sequence.request_id in gone
            self.waiting = deque(sequence for sequence in self.waiting if not sequence.ended)

    def schedule(self) -> list[Scheduled]:
        """What the next step computes; may be empty while all wait for tokens that are on their way."""
        scheduled: list[Scheduled] = []
        budget = self.max_num_batched_tokens
        preempted = False
        index = 0
        while index < len(self.running) and budget:
            sequence = self.running[index]
            if sequence.num_pending and sequence.num_generated >= sequence.max_tokens:
                index += 1  # its last token is on the way
                continue
            num_new = self._num_new(sequence, budget)
            if self._make_room(sequence, sequence.num_computed + num_new):
                scheduled.append(self._scheduled(sequence, num_new))
                budget -= num_new
                index += 1
            else:
                preempted = True
        while not preempted and self.waiting and budget and self._free_slots:
            num_new = self._admit(self.waiting[0], budget, first=not scheduled)
            if not num_new:
                break
            sequence = self.waiting.popleft()
            sequence.slot = self._free_slots.pop()
            self.running.append(sequence)
            scheduled.append(self._scheduled(sequence, num_new, admitted=True))
            budget -= num_new
        return scheduled

    def launched(self, scheduled: Iterable[Scheduled]) -> None:
        """Note that a step is under way: what it computes can be shared by any step after it."""
        for item in scheduled:
            sequence = item.sequence
            sequence.num_computed += item.num_new
            sequence.num_pending += item.samples
            if item.samples:
                sequence.sampled_here = True
            self.blocks.register(sequence.table, sequence.token_ids, sequence.num_computed)

    def _scheduled(self, sequence: Sequence, num_new: int, admitted: bool = False) -> Scheduled:
        samples = sequence.num_computed + num_new == sequence.num_tokens
        decodes = sequence.sampled_here and num_new == 1
        scores_prompt = sequence.prompt_logprobs_left and sequence.num_computed < sequence.num_prompt
        return Scheduled(sequence, sequence.num_computed, num_new, samples, decodes, admitted, scores_prompt)

    def _num_new(self, sequence: Sequence, budget: int) -> int:
        limit = PROMPT_LOGPROBS_CHUNK if sequence.prompt_logprobs_left else budget
        return min(sequence.num_tokens - sequence.num_computed, budget, limit)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for a running sequence, at the cost of younger ones; False if it was the youngest itself."""
        while not self.blocks.grow(sequence.table, num_tokens):
            victim = self.running.pop()
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _give_up_place(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.table)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        sequence.sampled_here = False

    def _preempt(self, sequence: Sequence) -> None:
        self._give_up_place(sequence)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _admit(self, sequence: Sequence, budget: int, first: bool) -> int:
        """Give a waiting sequence its first blocks; returns how many tokens it may compute, 0 for not yet.

        It is let in only if all its tokens so far would fit, so that prefills do not evict each other
        half-way; what it may still generate is not reserved.
        """
        if sequence.num_pending:
            return 0  # preempted with a token on its way, which belongs to what is computed again
        if not sequence.prompt_logprobs_left:
            sequence.num_computed = self.blocks.take_prefix(sequence.table, sequence.token_ids)
        num_new = self._num_new(sequence, budget)
        whole = sequence.num_computed + num_new == sequence.num_tokens
        must_wait = not (whole or first or self.enable_chunked_prefill)
        if must_wait or not self.blocks.can_grow(sequence.table, sequence.num_tokens):
            self.blocks.release(sequence.table)
            sequence.num_computed = 0
            return 0
        if sequence.num_generated == 0:
            sequence.num_cached = sequence.num_computed
        self.blocks.grow(sequence.table, sequence.num_computed + num_new)
        return num_new
