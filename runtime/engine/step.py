"""What a step hands over: from the engine to whatever runs it, and back."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Protocol

import torch

from runtime.engine.scheduler import Scheduled
from runtime.engine.sequence import Sequence
from runtime.protocol import TokenLogprobs


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Which tokens some of a step's sequences may take: bits [N, W] int32 on the host, one bit a token."""

    sequences: Rows[Sequence]
    bits: torch.Tensor


@dataclass(slots=True)
class StepResult:
    """What one step produced, in the order in which its sequences were scheduled.

    `tokens` and `logprobs` have one entry for each sequence that samples; `prompt_logprobs` has one list
    for each that still owes log probabilities of its prompt: those of the tokens after each new one.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    prompt_logprobs: list[list[TokenLogprobs]] = field(default_factory=list)


class Launched(Protocol):
    """A step under way, up to its logits."""

    def sample(self, masks: TokenMasks | None = None) -> None:
        """Begin to draw its tokens: once, before the next step is launched."""
        ...

    def result(self) -> StepResult:
        """Wait for the step and return what it produced."""
        ...


class Runner(Protocol):
    """Carries out steps, in order, on one kind of device.

    `steps_ahead` is how many further steps, at most one, may be launched before the first one's result is
    asked for. A prompt of `usual_prompt` tokens, a few, is computed in the way that most prompts are, so
    that everything has been loaded for them after one.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def steps_ahead(self) -> int: ...
    @property
    def usual_prompt(self) -> int: ...

    def launch(self, scheduled: Rows[Scheduled]) -> Launched:
        """Begin to compute what is scheduled."""
        ...

    def use_idle_time(self) -> bool:
        """Do a little of what makes later steps faster; False if nothing of the kind is left."""
        ...
