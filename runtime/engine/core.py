"""The engine without its process: requests in, one step's output out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain

from runtime.engine.grammar.constraint import Constraint
from runtime.engine.grammar.grammars import GrammarError, Grammars
from runtime.engine.grammar.masks import Masks
from runtime.engine.grammar.token_rules import TokenRules, mask_words
from runtime.engine.scheduler import Scheduled, Scheduler
from runtime.engine.sequence import Sequence
from runtime.engine.step import Launched, Runner
from runtime.protocol import EngineStats, SamplingParams, StepOutput, Submit, TokenDelta, TokenLogprobs


class Engine:
    """Owns the sequences. Everything it does, it does between two steps, so there are no locks.

    A runner that works ahead is given step n + 1 before the tokens of step n are looked at. That a
    sequence has come to its end is then noticed one step late, and the token too many is dropped. Where a
    grammar depends on those tokens, step n + 1 is computed up to its logits meanwhile. Masks are made for
    it while that goes on, and while step n is told and step n + 2 is scheduled.

    `position_base` says what is added to the positions of a request whose prompt has that many tokens;
    `pin_masks` puts masks where a GPU copies from without waiting.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        max_model_len: int,
        seed: int,
        grammars: Grammars,
        position_base: Callable[[int], int] = lambda num_prompt: 0,
        pin_masks: bool = False,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.max_model_len = max_model_len
        self.vocab_size = runner.vocab_size
        self.seed = seed
        self.grammars = grammars
        self._masks = Masks(scheduler.max_num_seqs, self.vocab_size, pin_masks)
        self._position_base = position_base
        self.stats = EngineStats(blocks_total=scheduler.blocks.num_blocks)
        # What all steps so far computed, in one number, where there are other ranks to compare it with.
        self.keeps_fingerprint = False
        self.fingerprint = 0
        self._num_submitted = 0
        self._refused: list[TokenDelta] = []
        self._under_way: deque[tuple[list[Scheduled], Launched]] = deque()
        # Begins to draw the tokens of the step launched last, if that still waits for its masks.
        self._sample: Callable[[], None] | None = None

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_work or bool(self._refused or self._under_way)

    def submit(self, request: Submit) -> None:
        """Queue a request. One that cannot be served costs its sender an error and nobody else anything.

        A grammar that is not compiled yet is compiled here and now.
        """
        problem = self._problem(request)
        if problem is not None:
            self._refuse(request.request_id, problem)
            return
        try:
            constraint = self._constraint(request.sampling)
        except GrammarError as error:
            field = request.sampling.grammar.field if request.sampling.grammar is not None else ""
            self._refuse(request.request_id, f"'{field}' is not valid: {error}", field)
            return
        seed = request.sampling.seed
        if seed is None:
            seed = hash((self.seed, self._num_submitted))
        base = self._position_base(len(request.prompt_token_ids))
        sequence = Sequence(request, self._num_submitted, seed, self.max_model_len, base)
        sequence.constraint = constraint
        self.scheduler.add(sequence)
        self._num_submitted += 1

    def _constraint(self, sampling: SamplingParams) -> Constraint | None:
        if not sampling.masked:
            return None
        grammar = sampling.grammar
        rules = None
        if sampling.allowed_token_ids or sampling.bad_words:
            rules = TokenRules(sampling, mask_words(self.vocab_size))
        if grammar is not None:
            return Constraint(self.grammars.matcher(grammar), rules, grammar.field)
        return None if rules is None else Constraint(None, rules, rules.field)

    def _refuse(self, request_id: str, problem: str, param: str | None = None) -> None:
        delta = TokenDelta(request_id=request_id, finish_reason="refused", error=problem, param=param)
        self._refused.append(delta)

    def _problem(self, request: Submit) -> str | None:
        prompt = request.prompt_token_ids
        if not prompt:
            return "The prompt is empty; it needs at least one token."
        if len(prompt) >= self.max_model_len:
            return (
                f"The prompt has {len(prompt)} tokens, and prompt and answer together may have at most "
                f"{self.max_model_len}; shorten it."
            )
        sampling = request.sampling
        allowed, bad_words = sampling.allowed_token_ids, sampling.bad_words
        named = chain(prompt, sampling.stop_token_ids, sampling.logit_bias, allowed, *bad_words)
        if not all(0 <= token_id < self.vocab_size for token_id in named):
            return f"A token id is out of range: this model's ids go from 0 to {self.vocab_size - 1}."
        return None

    def launch_apart(self, request: Submit) -> Launched:
        """Launch the one step of a request for one token, of which nothing is counted or told by `step`.

        The engine must have nothing to do. What is submitted afterwards is computed behind it.
        """
        base = self._position_base(len(request.prompt_token_ids))
        self.scheduler.add(Sequence(request, 0, 0, self.max_model_len, base))
        launched = self.runner.launch(self.scheduler.schedule())
        launched.sample()
        self.scheduler.remove([request.request_id])
        return launched

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget these requests and free their blocks."""
        self.scheduler.remove(request_ids)

    def step(self) -> StepOutput:
        """Launch one step; once the runner is far enough ahead, say what the oldest under way produced."""
        deltas, self._refused = self._refused, []
        scheduled = self.scheduler.schedule()
        if self._sample is not None:
            self._sample()
            self._sample = None
        held = [i.sequence for i in scheduled if i.sequence.constraint is not None and i.samples]
        waits = bool(held and self._under_way)
        if scheduled:
            self._note_admitted(scheduled)
            launched = self.runner.launch(scheduled)
            if not waits:
                launched.sample(self._masks.begin(held)() if held else None)
            self._under_way.append((scheduled, launched))
            self.scheduler.launched(scheduled)
            if self.keeps_fingerprint:
                self.fingerprint = hash((self.fingerprint, *map(_fingerprint, scheduled)))
        # The very first token waits for no second step, which loads what decodes are computed with.
        goes_ahead = scheduled and self.stats.generated_tokens_total
        if len(self._under_way) > (self.runner.steps_ahead if goes_ahead else 0):
            deltas += self._take(*self._under_way.popleft())
        if waits:
            masks = self._masks.begin(held)
            self._sample = lambda: launched.sample(masks())
        self._count()
        return StepOutput(deltas=deltas, stats=self.stats)

    @staticmethod
    def _note_admitted(scheduled: list[Scheduled]) -> None:
        now = time.monotonic()
        for item in scheduled:
            if item.admitted and not item.sequence.taken_up:
                item.sequence.taken_up = now

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
            delta.prefill_seconds = time.monotonic() - sequence.taken_up
            self.stats.prompt_tokens_total += sequence.num_prompt
            self.stats.cached_tokens_total += sequence.num_cached
        self.stats.generated_tokens_total += 1
        constraint = sequence.constraint
        stops = token_id in sequence.stop_token_ids and num_generated >= sequence.sampling.min_tokens
        if constraint is not None and not (constraint.spent or stops):
            constraint.accept(token_id)
        if constraint is not None and constraint.problem is not None:
            delta.finish_reason, delta.error, delta.param = "refused", constraint.problem, constraint.field
        elif constraint is not None and constraint.spent:
            delta.finish_reason = "stop"
        elif stops:
            delta.finish_reason, delta.stop_token_id = "stop", token_id
        else:
            sequence.token_ids.append(token_id)
            delta.token_ids = [token_id]
            if logprobs is not None:
                delta.logprobs = [logprobs]
            if constraint is not None and constraint.complete:
                delta.finish_reason = "stop"
            elif num_generated + 1 >= sequence.max_tokens:
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
