"""All cases of an offline benchmark, several rounds of them, on any engine, with the answers checked.

Needs nothing but the standard library, so that it runs in a peer's Python too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass

from harness.answers import References
from harness.report import progress
from harness.workload import CASES, QUICK_CASES, Case, Generate, Request, random_ids, selected

CROWD = 6
ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Task:
    """What is to be measured. `only` names cases; empty means all."""

    quick: bool
    only: list[str]
    rounds: int
    vocab_size: int
    tensor_parallel_size: int

    @property
    def cases(self) -> list[Case]:
        return selected(QUICK_CASES if self.quick else CASES, self.only)

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        return cls(**json.loads(text))


def verify(who: str, generate: Generate, references: References, seed: str, vocab_size: int) -> None:
    """Raise BenchError unless the reference answers come right, alone and in a crowd."""
    both = (references.explain, references.count)
    known = [Request(reference.prompt_token_ids, ANSWER_TOKENS) for reference in both]
    alone = generate(known[:1])[0]
    references.explain.check_ids(who, alone)
    draw = random.Random(seed)
    crowd = [Request(random_ids(draw, 64, vocab_size), ANSWER_TOKENS) for _ in range(CROWD)]
    for reference, token_ids in zip(both, generate(known + crowd), strict=False):
        reference.check_ids(f"{who}, in a batch,", token_ids)


def measure(
    who: str, generate: Generate, references: References, task: Task, settle: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds of each case, round by round. A first round, which does not count, warms everything up;
    `settle` is called after it."""
    measure_round(who, generate, references, task, "warm-up")
    settle()
    rounds = [
        measure_round(who, generate, references, task, f"round {turn + 1} of {task.rounds}")
        for turn in range(task.rounds)
    ]
    return {case.name: [seconds[case.name] for seconds in rounds] for case in task.cases}


def measure_round(
    who: str, generate: Generate, references: References, task: Task, name: str
) -> dict[str, float]:
    """Each case once, in seconds, and after each the reference answers."""
    found = {}
    for case in task.cases:
        progress(f"{who}: {case.name}, {name}")
        found[case.name] = case.seconds(generate, name, task.vocab_size)
        verify(who, generate, references, f"{case.name} {name}", task.vocab_size)
    return found
