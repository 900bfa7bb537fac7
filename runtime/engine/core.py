"""The engine without its process: requests in, one step's output out."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from runtime.engine.runner import Runner
from runtime.engine.sampler import sample, token_logprobs
from runtime.engine.scheduler import Scheduled, Scheduler
from runtime.engine.sequence import Sequence
from runtime.protocol import EngineStats, StepOutput, Submit, TokenDelta


class Engine:
    """Owns the sequences. Everything it does, it does between two steps, so there are no locks."""

    def __init__(self, runner: Runner, scheduler: Scheduler, max_model_len: int, seed: int) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.max_model_len = max_model_len
        self.vocab_size = runner.decoder.config.vocab_size
        self.seed = seed
        self.stats = EngineStats(blocks_total=scheduler.blocks.num_blocks)
        self._num_submitted = 0
        self._refused: list[TokenDelta] = []

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_work or bool(self._refused)

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
        self.scheduler.add(Sequence(request, self._num_submitted, seed))
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
        """Compute one step and say what it produced."""
        deltas, self._refused = self._refused, []
        scheduled = self.scheduler.schedule()
        if scheduled:
            logits = self.runner.execute(scheduled)
            deltas += self._take(scheduled, logits)
        self._count()
        return StepOutput(deltas=deltas, stats=self.stats)

    @torch.inference_mode()
    def _take(self, scheduled: list[Scheduled], logits: torch.Tensor) -> list[TokenDelta]:
        """Sample the sequences that reached their end and make their deltas."""
        rows: list[int] = []
        at = 0
        for item in scheduled:
            if item.sequence.prompt_logprobs_left:
                self._note_prompt_logprobs(item, logits[at : at + item.num_new])
                at += item.num_new
            elif item.samples:
                at += 1
            if item.samples:
                rows.append(at - 1)
        samplers = [item.sequence for item in scheduled if item.samples]
        self.scheduler.computed(scheduled)
        if not samplers:
            return []
        if len(rows) != logits.shape[0]:
            logits = logits[torch.tensor(rows, device=logits.device)]
        wanted = [row for row, sequence in enumerate(samplers) if sequence.sampling.logprobs is not None]
        untouched = logits[torch.tensor(wanted, dtype=torch.long, device=logits.device)]
        tokens = sample(logits, samplers)
        deltas = [
            self._advance(sequence, token_id) for sequence, token_id in zip(samplers, tokens, strict=True)
        ]
        for row, index in enumerate(wanted):
            num_top = samplers[index].sampling.logprobs or 0
            if deltas[index].token_ids:
                deltas[index].logprobs = token_logprobs(untouched[row : row + 1], [tokens[index]], num_top)
        return deltas

    def _note_prompt_logprobs(self, item: Scheduled, logits: torch.Tensor) -> None:
        """Keep entries for the prompt tokens that this chunk's logits predict; the very first has none."""
        sequence, start = item.sequence, item.sequence.num_computed
        if start == 0:
            sequence.prompt_logprobs = [None]  # anew, should the sequence have been preempted
        targets = sequence.token_ids[start + 1 : min(start + item.num_new + 1, sequence.num_prompt)]
        if targets:
            num_top = sequence.sampling.prompt_logprobs or 0
            sequence.prompt_logprobs += token_logprobs(logits[: len(targets)], targets, num_top)
        if item.samples:
            sequence.prompt_logprobs_left = False

    def _advance(self, sequence: Sequence, token_id: int) -> TokenDelta:
        """Append a sampled token and see whether it was the last."""
        delta = TokenDelta(request_id=sequence.request_id)
        if sequence.num_generated == 0:
            delta.num_cached_tokens = sequence.num_cached
            delta.prompt_logprobs = sequence.prompt_logprobs
            self.stats.prompt_tokens_total += sequence.num_prompt
            self.stats.cached_tokens_total += sequence.num_cached
        self.stats.generated_tokens_total += 1
        stops = token_id in sequence.stop_token_ids and sequence.num_generated >= sequence.sampling.min_tokens
        if stops:
            delta.finish_reason, delta.stop_token_id = "stop", token_id
        else:
            sequence.token_ids.append(token_id)
            delta.token_ids = [token_id]
            if (
                sequence.num_generated >= sequence.sampling.max_tokens
                or sequence.num_tokens >= self.max_model_len
            ):
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
