"""The engine without its process: requests in, one step's output out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from runtime.engine.scheduler import Scheduled, Scheduler
from runtime.engine.sequence import Sequence
from runtime.engine.step import Launched, Runner
from runtime.protocol import EngineStats, StepOutput, Submit, TokenDelta, TokenLogprobs


class Engine:
    """Owns the sequences. Everything it does, it does between two steps, so there are no locks.

    A runner that works ahead is given step n + 1 before the tokens of step n are looked at. That a
    sequence has come to its end is then noticed one step late, and the token too many is dropped.

    `position_base` says what is added to the positions of a request whose prompt has that many tokens.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        max_model_len: int,
        seed: int,
        position_base: Callable[[int], int] = lambda num_prompt: 0,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.max_model_len = max_model_len
        self.vocab_size = runner.vocab_size
        self.seed = seed
        self._position_base = position_base
        self.stats = EngineStats(blocks_total=scheduler.blocks.num_blocks)
        # What all steps so far computed, in one number, where there are other ranks to compare it with.
        self.keeps_fingerprint = False
        self.fingerprint = 0
        self._num_submitted = 0
        self._refused: list[TokenDelta] = []
        self._under_way: deque[tuple[list[Scheduled], Launched]] = deque()

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_work or bool(self._refused or self._under_way)

    def submit(self, request: Submit) -> None:
        """Queue a request. One that cannot be served costs its sender an error and nobody else anything."""
        problem = self._problem(request)
        if problem is not None:
            self._refused.append(
                TokenDelta(request_id=request.request_id, finish_reason="error", error=problem)
            )
            return
        seed = request.sampling.seed
        if seed is None:
            seed = hash((self.seed, self._num_submitted))
        base = self._position_base(len(request.prompt_token_ids))
        self.scheduler.add(Sequence(request, self._num_submitted, seed, self.max_model_len, base))
        self._num_submitted += 1

    def _problem(self, request: Submit) -> str | None:
        prompt = request.prompt_token_ids
        if not prompt:
            return "The prompt is empty; it needs at least one token."
        if len(prompt) >= self.max_model_len:
            return (
                f"The prompt has {len(prompt)} tokens, and prompt and answer together may have at most "
                f"{self.max_model_len}; shorten it."
            )
        named = (*request.sampling.stop_token_ids, *request.sampling.logit_bias)
        if not all(0 <= token_id < self.vocab_size for token_id in (*prompt, *named)):
            return f"A token id is out of range: this model's ids go from 0 to {self.vocab_size - 1}."
        return None

    def reset_counters(self) -> None:
        """Start counting, and numbering requests, from the beginning."""
        self.stats = EngineStats(blocks_total=self.scheduler.blocks.num_blocks)
        self._num_submitted = 0

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget these requests and free their blocks."""
        self.scheduler.remove(request_ids)

    def step(self) -> StepOutput:
        """Launch one step; once the runner is far enough ahead, say what the oldest under way produced."""
        deltas, self._refused = self._refused, []
        scheduled = self.scheduler.schedule()
        if scheduled:
            self._under_way.append((scheduled, self.runner.launch(scheduled)))
            self.scheduler.launched(scheduled)
            if self.keeps_fingerprint:
                self.fingerprint = hash((self.fingerprint, *map(_fingerprint, scheduled)))
        if len(self._under_way) > (self.runner.steps_ahead if scheduled else 0):
            deltas += self._take(*self._under_way.popleft())
        self._count()
        return StepOutput(deltas=deltas, stats=self.stats)

    def _take(self, scheduled: list[Scheduled], launched: Launched) -> list[TokenDelta]:
        """What a step that is through means for its sequences."""
        result = launched.result()
        if self.keeps_fingerprint:
            self.fingerprint = hash((self.fingerprint, *result.tokens))
        prompt_logprobs = iter(result.prompt_logprobs)
        sampled = iter(zip(result.tokens, result.logprobs, strict=True))
        deltas = []
        for item in scheduled:
            sequence = item.sequence
            if item.scores_prompt:
                self._note_prompt_logprobs(item, next(prompt_logprobs))
            if item.samples:
                token_id, logprobs = next(sampled)
                sequence.num_pending -= 1
                if not sequence.ended:
                    deltas.append(self._advance(sequence, token_id, logprobs))
        return deltas

    def _note_prompt_logprobs(self, item: Scheduled, entries: list[TokenLogprobs]) -> None:
        """Keep entries for the prompt tokens that this chunk's logits predict; the very first has none."""
        sequence = item.sequence
        if item.start == 0:
            sequence.prompt_logprobs = [None]  # anew, should the sequence have been preempted
        sequence.prompt_logprobs += entries
        if item.samples:
            sequence.prompt_logprobs_left = False

    def _advance(self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> TokenDelta:
        """Append a sampled token and see whether it was the last."""
        delta = TokenDelta(request_id=sequence.request_id)
        num_generated = len(sequence.token_ids) - sequence.num_prompt
        if num_generated == 0:
            delta.num_cached_tokens = sequence.num_cached
            delta.prompt_logprobs = sequence.prompt_logprobs
            self.stats.prompt_tokens_total += sequence.num_prompt
            self.stats.cached_tokens_total += sequence.num_cached
        self.stats.generated_tokens_total += 1
        if token_id in sequence.stop_token_ids and num_generated >= sequence.sampling.min_tokens:
            delta.finish_reason, delta.stop_token_id = "stop", token_id
        else:
            sequence.token_ids.append(token_id)
            delta.token_ids = [token_id]
            if logprobs is not None:
                delta.logprobs = [logprobs]
            if num_generated + 1 >= sequence.max_tokens:
                delta.finish_reason = "length"
        if delta.finish_reason is not None:
            self.scheduler.remove([sequence.request_id])
        return delta

    def _count(self) -> None:
        stats, scheduler = self.stats, self.scheduler
        stats.running, stats.waiting = len(scheduler.running), len(scheduler.waiting)
        stats.blocks_used = scheduler.blocks.num_blocks - scheduler.blocks.num_free
        stats.preemptions_total = scheduler.num_preemptions
        stats.steps_total += 1


def _fingerprint(item: Scheduled) -> int:
    """Of numbers alone: the hashes of texts differ from process to process."""
    sequence = item.sequence
    return hash((sequence.order, sequence.slot, item.start, item.num_new, sequence.table.block_ids[-1]))
