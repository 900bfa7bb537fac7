"""What a load of requests experienced: time to first token, time per token, goodput, errors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness import BenchError
from harness.load import Outcome
from harness.summary import percentiles


@dataclass(frozen=True)
class Objective:
    """When an answer counts as good: seconds to its first token, and per token after that."""

    ttft: float
    tpot: float


@dataclass(frozen=True)
class Experience:
    """One load. Times in seconds, percentiles of all answers that were complete."""

    requests: int
    errors: list[str]
    output_tokens: int
    seconds: float
    ttft: dict[str, float]
    tpot: dict[str, float]
    longest_gap: dict[str, float]
    good: int

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of complete answers, from the first request's time to the last token."""
        return self.output_tokens / self.seconds

    @property
    def goodput(self) -> float:
        """Requests a second that met the objective."""
        return self.good / self.seconds

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "tokens_per_second": self.tokens_per_second, "goodput": self.goodput}


def experience(outcomes: Sequence[Outcome], lengths: Sequence[int], objective: Objective) -> Experience:
    """What the clients saw; `lengths` are the tokens that each asked for.

    A request that failed is an error among others. Raises BenchError if none succeeded, and if an
    answer that looks complete has another number of tokens.
    """
    complete = []
    for outcome, length in zip(outcomes, lengths, strict=True):
        if outcome.answer.error is not None:
            continue
        if outcome.answer.completion_tokens != length:
            raise BenchError(
                f"{length} tokens were asked for; an answer ended with {outcome.answer.completion_tokens}"
            )
        complete.append((outcome, length))
    errors = [outcome.answer.error for outcome in outcomes if outcome.answer.error is not None]
    if not complete:
        raise BenchError(f"every request failed; the first one: {errors[0]}")
    ttft = [outcome.answer.first - outcome.asked for outcome, _ in complete]
    tpot = [(outcome.answer.last - outcome.answer.first) / max(length - 1, 1) for outcome, length in complete]
    gaps = [_longest_gap(outcome.answer.times) for outcome, _ in complete]
    met = [to <= objective.ttft and per <= objective.tpot for to, per in zip(ttft, tpot, strict=True)]
    began = min(outcome.asked for outcome in outcomes)
    return Experience(
        requests=len(outcomes),
        errors=errors,
        output_tokens=sum(length for _, length in complete),
        seconds=max(outcome.answer.last for outcome, _ in complete) - began,
        ttft=percentiles(ttft),
        tpot=percentiles(tpot),
        longest_gap=percentiles(gaps),
        good=sum(met),
    )


def _longest_gap(times: Sequence[float]) -> float:
    """The longest time that a stream stood still between two pieces."""
    return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)
