"""What is counted about requests. `exposition` writes it down for Prometheus.

Counting is plain arithmetic on the way of every token, so it is done by hand.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence as Items

from runtime.text.sequence import Sequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_CHOICES = (1, 2, 5, 10, 20)


class Histogram:
    """Counts of observations by bucket; `bounds` are the buckets' upper ends."""

    def __init__(self, bounds: Items[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Prometheus' buckets: for each upper end, how many observations lie at or below it."""
        buckets, running = [], 0
        for bound, count in zip(
            (*(str(float(end)) for end in self.bounds), "+Inf"), self.counts, strict=True
        ):
            running += count
            buckets.append((bound, float(running)))
        return buckets


class Metrics:
    """The handler's counters. Times are in seconds."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, str]] = Counter()
        self.reasons: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.disconnects = 0
        self.ttft = Histogram(SECONDS)
        self.inter_token = Histogram(_PER_TOKEN)
        self.tpot = Histogram(_PER_TOKEN)
        self.latency = Histogram(SECONDS)
        self.queue = Histogram(SECONDS)
        self.prefill = Histogram(SECONDS)
        self.decode = Histogram(SECONDS)
        self.prompt_lengths = Histogram(_TOKENS)
        self.answer_lengths = Histogram(_TOKENS)
        self.max_tokens = Histogram(_TOKENS)
        self.choices = Histogram(_CHOICES)

    def asked(self, sequences: Items[Sequence]) -> None:
        """A request is on its way to the engine."""
        for sequence in sequences:
            self.max_tokens.observe(sequence.submit.sampling.max_tokens)
            if sequence.counts_prompt:
                length = len(sequence.submit.prompt_token_ids)
                self.prompt_tokens += length
                self.prompt_lengths.observe(length)
        self.choices.observe(len(sequences))

    def began(self, ttft: float, queue: float) -> None:
        """A request has got its first token after `ttft`, having waited for the engine for `queue` of it."""
        self.ttft.observe(ttft)
        self.queue.observe(queue)
        self.prefill.observe(ttft - queue)

    def finished(self, sequence: Sequence, reason: str, decode_seconds: float) -> None:
        """One sequence has ended, `decode_seconds` after the request's first token."""
        self.reasons[reason] += 1
        self.answer_lengths.observe(sequence.generated)
        self.decode.observe(decode_seconds)
        if sequence.generated > 1:
            self.tpot.observe(decode_seconds / (sequence.generated - 1))
