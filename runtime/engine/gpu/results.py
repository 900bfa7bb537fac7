"""What a step on the device sends back: tokens, and log probabilities where somebody asked for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from runtime.engine.step import StepResult, TokenMasks
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
class Drawn:
    """The tokens that a step draws, on their way; `scored` are the rows that `scores` is about, in order."""

    tokens: torch.Tensor
    done: torch.cuda.Event
    scored: list[int] = field(default_factory=list)
    scores: Scores | None = None


@dataclass(slots=True)
class UnderWay:
    """A step on the device.

    `draw` begins to sample; `order[i]` is the row that samples for the i-th sequence that does; `prompts`
    has one entry for each sequence whose prompt is scored.
    """

    draw: Callable[[TokenMasks | None], Drawn]
    order: list[int]
    prompts: list[Scores] = field(default_factory=list)
    drawn: Drawn | None = None

    def sample(self, masks: TokenMasks | None = None) -> None:
        """Begin to draw the step's tokens; see `Launched.sample`."""
        self.drawn = self.draw(masks)

    def result(self) -> StepResult:
        """Wait for the step and return what it produced."""
        drawn = self.drawn
        assert drawn is not None
        drawn.done.synchronize()
        tokens = drawn.tokens.tolist()
        logprobs: list[TokenLogprobs | None] = [None] * len(tokens)
        if drawn.scores is not None:
            for row, entry in zip(drawn.scored, drawn.scores.entries(), strict=True):
                logprobs[row] = entry
        return StepResult(
            tokens=[tokens[row] for row in self.order],
            logprobs=[logprobs[row] for row in self.order],
            prompt_logprobs=[scores.entries() for scores in self.prompts],
        )
