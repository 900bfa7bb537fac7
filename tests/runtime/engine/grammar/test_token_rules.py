"""Tokens that are allowed at all, and words that must not come, on runners that work ahead or do not.

The stand-in for the model (see `test_grammar.py`) draws from what a mask leaves by a hash of the whole
history, so that what must come can be said without any mask.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime.engine.core import Engine
from runtime.engine.grammar.grammars import Grammars
from runtime.protocol import Grammar, SamplingParams, Submit
from runtime.text import grammar as grammars_of
from tests.runtime.engine.grammar.test_grammars import VOCAB, answers, make_engine

ALLOWED = (5, 40, 41, 42)
BAD_WORDS = ((40, 41), (41, 42, 40), (5, 5, 5, 5), (42, 42, 41))
PROMPT = [1, 41, 42]  # a word is not completed by what the prompt ends with


@pytest.fixture(scope="module")
def grammars(tiny_model: Path) -> Grammars:
    return Grammars(tiny_model, VOCAB)


def request(name: str, max_tokens: int = 60, **sampling: Any) -> Submit:
    params = SamplingParams(max_tokens=max_tokens, seed=int(name.rpartition("-")[2]), **sampling)
    return Submit(request_id=name, prompt_token_ids=PROMPT, sampling=params)


def expected(seed: int, allowed: tuple[int, ...], bad_words: tuple[tuple[int, ...], ...]) -> list[int]:
    """What the stand-in answers, found out with nothing but lists."""
    answer: list[int] = []
    while len(answer) < 60:
        choices = [
            token
            for token in sorted(allowed or range(VOCAB))
            if not any([*answer, token][-len(word) :] == list(word) for word in bad_words)
        ]
        answer.append(choices[hash((seed, *PROMPT, *answer)) % len(choices)])
    return answer


def run(engine: Engine, requests: list[Submit]) -> dict[str, list[int]]:
    return {name: delta.token_ids for name, delta in answers(engine, requests).items()}


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize(
    "rules",
    [
        {"allowed_token_ids": ALLOWED},
        {"bad_words": BAD_WORDS},
        {"allowed_token_ids": ALLOWED, "bad_words": BAD_WORDS},
    ],
    ids=["allowed", "bad words", "both"],
)
def test_what_comes_is_what_the_rules_leave(
    grammars: Grammars, steps_ahead: int, rules: dict[str, Any]
) -> None:
    """Alone, in a crowd, and for sequences that are preempted and computed again."""
    wanted = {
        f"r-{seed}": expected(seed, rules.get("allowed_token_ids", ()), rules.get("bad_words", ()))
        for seed in range(20)
    }
    requests = [request(name, **rules) for name in wanted]
    others = [request(f"free-{seed}") for seed in range(9)]
    assert run(make_engine(grammars, steps_ahead), requests[:1]) == {"r-0": wanted["r-0"]}
    tight = make_engine(grammars, steps_ahead, num_blocks=60)
    together = run(tight, [*requests, *others])
    assert tight.scheduler.num_preemptions > 0
    assert {name: together[name] for name in wanted} == wanted
    free = run(make_engine(grammars, 0), others)
    assert {name: together[name] for name in free} == free


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_grammar_s_answers_obey_them_too(grammars: Grammars, steps_ahead: int) -> None:
    letters = Grammar(grammars_of.source(grammars_of.regex("[abc]{12}")), "guided_regex")
    first = ord("a") - ord("!")  # tokens of one byte stand in the bytes' order
    words = ((first, first), (first + 1, first, first + 2))
    requests = [request(f"r-{seed}", grammar=letters, bad_words=words) for seed in range(20)]
    for ids in run(make_engine(grammars, steps_ahead), requests).values():
        assert len(ids) == 12
        assert set(ids) <= {first, first + 1, first + 2}
        for word in words:
            assert not any(tuple(ids[at : at + len(word)]) == word for at in range(12))


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_where_they_leave_nothing_the_request_is_refused_and_no_other(
    grammars: Grammars, steps_ahead: int
) -> None:
    impossible = request("bad-1", allowed_token_ids=(7,), bad_words=((7, 7, 7),))
    got = answers(make_engine(grammars, steps_ahead), [impossible, request("good-2", allowed_token_ids=(7,))])
    assert (got["bad-1"].token_ids, got["bad-1"].finish_reason) == ([7, 7], "refused")
    assert got["bad-1"].param == "allowed_token_ids"
    assert got["good-2"].token_ids == [7] * 60


@pytest.mark.parametrize("rules", [{"allowed_token_ids": (VOCAB,)}, {"bad_words": ((1, VOCAB),)}])
def test_ids_that_the_model_does_not_have(grammars: Grammars, rules: dict[str, Any]) -> None:
    got = answers(make_engine(grammars, 1), [request("bad-1", **rules), request("good-2")])
    assert "out of range" in (got["bad-1"].error or "")
    assert len(got["good-2"].token_ids) == 60
