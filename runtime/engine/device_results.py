"""What a step on the device sends back: tokens, and log probabilities where somebody asked for them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from runtime.engine.step import StepResult
from runtime.kernels.gpu.sampling.logprobs import Logprobs, token_logprobs
from runtime.protocol import TokenLogprobs


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Begin to copy a tensor to pinned memory; it may be read when the step is done."""
    target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return target.copy_(tensor, non_blocking=True)


@dataclass(slots=True)
class Scores:
    """Log probabilities on their way to the host. `num_top[i]` of the likeliest are wanted in row i."""

    tokens: torch.Tensor
    logprobs: Logprobs
    num_top: list[int]

    @classmethod
    def of(cls, logits: torch.Tensor, tokens: torch.Tensor, num_top: list[int]) -> Scores:
        """Those of tokens [R] under logits [R, vocab_size]."""
        found = token_logprobs(logits, tokens, max(num_top, default=0))
        on_host = (to_host(part) for part in (found.chosen, found.ranks, found.top_ids, found.top))
        return cls(to_host(tokens), Logprobs(*on_host), num_top)

    def entries(self) -> list[TokenLogprobs]:
        """One for each row; only when the step is done."""
        found = self.logprobs
        rows = zip(
            self.tokens.tolist(), found.chosen.tolist(), found.ranks.tolist(),
            found.top_ids.tolist(), found.top.tolist(), self.num_top, strict=True,
        )  # fmt: skip
        return [
            TokenLogprobs(token, own, rank, list(zip(ids[:wanted], values[:wanted], strict=True)))
            for token, own, rank, ids, values, wanted in rows
        ]


@dataclass(slots=True)
class UnderWay:
    """A step on the device.

    `order[i]` is the row that samples for the i-th sequence that does; `scored` are the rows that `scores`
    is about, in its order; `prompts` has one entry for each sequence whose prompt is scored.
    """

    tokens: torch.Tensor
    order: list[int]
    done: torch.cuda.Event
    scored: list[int] = field(default_factory=list)
    scores: Scores | None = None
    prompts: list[Scores] = field(default_factory=list)

    def result(self) -> StepResult:
        """Wait for the step and return what it produced."""
        self.done.synchronize()
        tokens = self.tokens.tolist()
        logprobs: list[TokenLogprobs | None] = [None] * len(tokens)
        if self.scores is not None:
            for row, entry in zip(self.scored, self.scores.entries(), strict=True):
                logprobs[row] = entry
        return StepResult(
            tokens=[tokens[row] for row in self.order],
            logprobs=[logprobs[row] for row in self.order],
            prompt_logprobs=[scores.entries() for scores in self.prompts],
        )
