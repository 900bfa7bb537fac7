"""Each family's greedy answers and their probabilities are its reference's, however the work is cut up.

The prompts cross what makes families differ with length: windows of 9 tokens, Qwen's 16 trained positions
and their doublings, before the answer begins and while it is written. Several begin alike, so that what is
cached for one may be taken for another, where it may.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.runtime.engine.test_against_transformers import ANSWER, make_engine, run, submit
from tests.runtime.model.checkpoints import CASES, Reference

TEXT = random.Random(3).choices(range(2, 120), k=80)
PROMPTS = {
    "three": TEXT[:3],
    "below the trained length": TEXT[:14],
    "the trained length": TEXT[:16],
    "one more": TEXT[:17],
    "twice": TEXT[:32],
    "three times": [*TEXT[:32], *TEXT[60:76]],
    "beyond four times": TEXT[:70],
}


class Case(NamedTuple):
    directory: Path
    reference: Reference


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp("model")
    return Case(directory, CASES[request.param](directory))


def check(reference: Reference, answers: tuple[dict[str, list[int]], dict[str, list[float]]]) -> None:
    """Every token is the likeliest after those before it, as likely as the reference says."""
    tokens, logprobs = answers
    for name, answer in tokens.items():
        prompt = PROMPTS[name]
        assert len(answer) == len(logprobs[name]) == ANSWER
        expected = reference(prompt + answer, len(prompt))[len(prompt) - 1 : -1].log_softmax(-1)
        assert answer == expected.argmax(-1).tolist(), name
        torch.testing.assert_close(torch.tensor(logprobs[name]), expected.max(-1).values, atol=1e-3, rtol=0)


def answers_of(engine: Any, *names: str) -> tuple[dict[str, list[int]], dict[str, list[float]]]:
    for name in names:
        submit(engine, name, PROMPTS[name], logprobs=0)
    return run(engine)


def test_alone_and_again_from_the_cache(case: Case) -> None:
    engine = make_engine(case.directory)
    first = {}
    for name in PROMPTS:
        first[name] = answers_of(engine, name)
        check(case.reference, first[name])
    before = engine.stats.cached_tokens_total
    assert answers_of(engine, "beyond four times")[0] == first["beyond four times"][0]
    assert engine.stats.cached_tokens_total == before + 64


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 11},
        {"max_num_batched_tokens": 11, "num_blocks": 9},
    ],
    ids=["in chunks", "preempted"],
)
def test_together(case: Case, settings: dict[str, Any]) -> None:
    settings = dict(settings)
    num_blocks = settings.pop("num_blocks", None)
    if num_blocks is not None:
        from runtime.engine.memory import block_bytes
        from runtime.model.families import read_model

        size = block_bytes(read_model(case.directory).config, 16, torch.float32)
        settings |= {"kv_cache_bytes": num_blocks * size, "max_model_len": 100}
    engine = make_engine(case.directory, **settings)
    answers = answers_of(engine, *PROMPTS)
    assert answers[0].keys() == PROMPTS.keys()
    check(case.reference, answers)
    assert (engine.stats.preemptions_total > 0) == (num_blocks is not None)
