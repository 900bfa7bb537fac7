"""What engines are given to do offline: greedy requests of token ids, with fixed lengths of answers."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness import BenchError

HIGHEST_ID = 100_000


@dataclass(frozen=True)
class Request:
    """A prompt and how many tokens exactly are to be generated after it."""

    prompt: list[int]
    max_tokens: int


Generate = Callable[[Sequence[Request]], list[list[int]]]
"""Runs all requests at once and returns the token ids generated for each, in their order."""


def random_ids(draw: random.Random, count: int, vocab_size: int) -> list[int]:
    """A prompt without meaning."""
    highest = min(HIGHEST_ID, vocab_size - 1)
    return [draw.randint(2, highest) for _ in range(count)]


def standard(vocab_size: int, count: int = 256, shortest: int = 100, longest: int = 1024) -> list[Request]:
    """The workload that published figures of other engines were measured with: seed 0, prompts and answers
    of `shortest` to `longest` tokens. The four prompts drawn first are those of its warm-up."""
    draw = random.Random(0)
    for _ in range(4):
        random_ids(draw, 100, vocab_size)
    return [
        Request(
            random_ids(draw, draw.randint(shortest, longest), vocab_size), draw.randint(shortest, longest)
        )
        for _ in range(count)
    ]


def timed(generate: Generate, requests: Sequence[Request]) -> float:
    """Seconds that all requests take. Raises BenchError if any has other than the tokens asked for."""
    began = time.perf_counter()
    answers = generate(requests)
    took = time.perf_counter() - began
    counts = [len(answer) for answer in answers]
    if counts != [request.max_tokens for request in requests]:
        raise BenchError(f"the engine generated {sum(counts)} tokens, but not those that were asked for")
    return took


@dataclass(frozen=True)
class Workload:
    """Requests of all lengths at once."""

    name: str
    count: int
    shortest: int
    longest: int

    def requests(self, vocab_size: int) -> list[Request]:
        return standard(vocab_size, self.count, self.shortest, self.longest)

    def seconds(self, generate: Generate, seed: str, vocab_size: int) -> float:
        """From submitting all of them to the last token of the last."""
        return timed(generate, self.requests(vocab_size))


@dataclass(frozen=True)
class Decode:
    """A batch of equal answers after short prompts."""

    name: str
    batch: int
    prompt: int
    tokens: int

    def seconds(self, generate: Generate, seed: str, vocab_size: int) -> float:
        """Per token of an answer (TPOT): what `tokens` more of them take than the first one alone."""
        first = timed(generate, self._requests(f"{seed} first", vocab_size, 1))
        return (timed(generate, self._requests(seed, vocab_size, 1 + self.tokens)) - first) / self.tokens

    def _requests(self, seed: str, vocab_size: int, tokens: int) -> list[Request]:
        draw = random.Random(f"{self.name} {seed}")
        return [Request(random_ids(draw, self.prompt, vocab_size), tokens) for _ in range(self.batch)]


@dataclass(frozen=True)
class Prefill:
    """Long prompts, each with an answer of one token."""

    name: str
    batch: int
    prompt: int

    def seconds(self, generate: Generate, seed: str, vocab_size: int) -> float:
        """Until the last prompt's token."""
        draw = random.Random(f"{self.name} {seed}")
        prompts = [random_ids(draw, self.prompt, vocab_size) for _ in range(self.batch)]
        return timed(generate, [Request(prompt, 1) for prompt in prompts])


Case = Workload | Decode | Prefill

STANDARD = Workload("standard", 256, 100, 1024)
PREFILL = Prefill("prefill-16x2000", 16, 2000)
QUICK_STANDARD = Workload("standard", 16, 10, 100)

CASES: tuple[Case, ...] = (
    STANDARD,
    Decode("single", 1, 128, 256),
    Decode("batch-8", 8, 128, 128),
    Decode("batch-64", 64, 128, 128),
    Decode("batch-256", 256, 128, 128),
    Prefill("prefill-1x8000", 1, 8000),
    PREFILL,
)
# The same kinds of work, small enough for two cores.
QUICK_CASES: tuple[Case, ...] = (
    QUICK_STANDARD,
    Decode("single", 1, 128, 32),
    Decode("batch-8", 8, 128, 32),
    Prefill("prefill-1x512", 1, 512),
    Prefill("prefill-4x256", 4, 256),
)


def selected(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """The cases of these names; all of them if there are no names."""
    known = {case.name: case for case in cases}
    for name in names:
        if name not in known:
            raise BenchError(f"there is no case {name}; there are {', '.join(known)}")
    return [known[name] for name in names or known]
