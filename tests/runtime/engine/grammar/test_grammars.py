"""Grammars in the engine: whatever the model says, what it gets to say is what they allow.

The stand-in for the model draws from what a mask leaves by a hash of the whole history. So a mask that is
a token late, of another sequence or not applied shows in the text, and a request gets the same answer in
any company, on a runner that works ahead and on one that does not.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from runtime.engine.blocks import BlockManager
from runtime.engine.core import Engine
from runtime.engine.grammar.grammars import GrammarError, Grammars
from runtime.engine.scheduler import Scheduled, Scheduler
from runtime.engine.sequence import Sequence
from runtime.engine.step import StepResult, TokenMasks
from runtime.protocol import Grammar, SamplingParams, Submit, TokenDelta
from runtime.text import grammar as grammars_of
from runtime.text.tokenizer import Tokenizer
from tests.conftest import CONFIG

VOCAB = CONFIG["vocab_size"]
END = CONFIG["eos_token_id"]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@dataclass
class Step:
    """Draws when it is told to, and needs to know by then what came before."""

    model: HashModel
    items: list[Scheduled]
    tokens: list[int] | None = None

    def sample(self, masks: TokenMasks | None = None) -> None:
        allowed = {} if masks is None else dict(zip(map(id, masks.sequences), masks.bits, strict=True))
        self.tokens = []
        for item in self.items:
            history = self.model.history[item.sequence.request_id]
            choices = np.arange(VOCAB)
            if id(item.sequence) in allowed:
                bits = allowed[id(item.sequence)].numpy().view(np.uint8)
                choices = np.flatnonzero(np.unpackbits(bits, bitorder="little", count=VOCAB))
            token = int(choices[hash((item.sequence.seed, *history)) % len(choices)])
            history.append(token)
            self.tokens.append(token)

    def result(self) -> StepResult:
        assert self.tokens is not None, "sampled before it is asked for"
        return StepResult(tokens=self.tokens, logprobs=[None] * len(self.tokens))


class HashModel:
    """Takes the place of the runner."""

    vocab_size = VOCAB

    def __init__(self, steps_ahead: int) -> None:
        self.steps_ahead = steps_ahead
        self.history: dict[str, list[int]] = {}

    def use_idle_time(self) -> bool:
        return False

    def launch(self, scheduled: Rows[Scheduled]) -> Step:
        for item in scheduled:
            sequence: Sequence = item.sequence
            self.history.setdefault(sequence.request_id, list(sequence.token_ids))
        return Step(self, [item for item in scheduled if item.samples])


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.load(tiny_model)


@pytest.fixture(scope="module")
def grammars(tiny_model: Path) -> Grammars:
    return Grammars(tiny_model, VOCAB)


def make_engine(
    grammars: Grammars, steps_ahead: int, num_blocks: int = 512, max_num_seqs: int = 64
) -> Engine:
    scheduler = Scheduler(BlockManager(num_blocks, 4, True), max_num_seqs, 64)
    return Engine(HashModel(steps_ahead), scheduler, 400, 0, grammars)


def request(name: str, source: str | None, max_tokens: int = 200, **sampling: object) -> Submit:
    given = {"stop_token_ids": (END,), "seed": int(name.rpartition("-")[2]), **sampling}
    grammar = None if source is None else Grammar(source, "response_format")
    return Submit(
        request_id=name,
        prompt_token_ids=[1, 2, 3],
        sampling=SamplingParams(max_tokens=max_tokens, grammar=grammar, **given),  # type: ignore[arg-type]
    )


def answers(engine: Engine, requests: list[Submit]) -> dict[str, TokenDelta]:
    """Everything that each request got, in one delta."""
    for item in requests:
        engine.submit(item)
    found: dict[str, TokenDelta] = {}
    while engine.has_work:
        for delta in engine.step().deltas:
            whole = found.setdefault(delta.request_id, TokenDelta(request_id=delta.request_id))
            assert whole.finish_reason is None, "nothing comes after the end"
            whole.token_ids = [*whole.token_ids, *delta.token_ids]
            whole.finish_reason, whole.stop_token_id = delta.finish_reason, delta.stop_token_id
            whole.error, whole.param = delta.error, delta.param
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    return found


CHAIN = "\n".join(["start: r0", *(f"r{n}: r{n + 1}" for n in range(3000)), 'r3000: "x"'])
SOURCES = {
    "json": grammars_of.source(grammars_of.json_schema(PERSON)),
    "regex": grammars_of.source(grammars_of.regex(r"[a-f]{3,9}-\d{2}")),
    "choice": grammars_of.source(grammars_of.choice(["yes", "yes, but", 'a "no"'])),
    "ebnf": grammars_of.source(grammars_of.grammar('root ::= "<" [xyz]{1,20} ">"')),
    "lark": grammars_of.source(grammars_of.grammar('start: "(" start? ")"')),
}


def check(kind: str, text: str) -> None:
    """Raise if a text is not what the grammar of this kind says."""
    if kind == "json":
        found = json.loads(text)
        assert set(found) == {"name", "age"}
        assert len(found["name"]) <= 8
        assert type(found["age"]) is int
    elif kind == "choice":
        assert text in ("yes", "yes, but", 'a "no"')
    elif kind == "lark":
        assert set(text) == {"(", ")"}
        assert text == "(" * (len(text) // 2) + ")" * (len(text) // 2)
    else:
        assert re.fullmatch({"regex": r"[a-f]{3,9}-\d{2}", "ebnf": r"<[xyz]{1,20}>"}[kind], text)


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_every_answer_follows_its_grammar_in_any_company(
    grammars: Grammars, tokenizer: Tokenizer, steps_ahead: int
) -> None:
    requests = [request(f"{kind}-{seed}", source) for seed in range(12) for kind, source in SOURCES.items()]
    requests += [request(f"free-{seed}", None, max_tokens=30) for seed in range(20)]
    together = answers(make_engine(grammars, steps_ahead, num_blocks=120), requests)
    assert len(together) == len(requests)
    for item in requests:
        got = together[item.request_id]
        alone = answers(make_engine(grammars, 0), [item])[item.request_id]
        assert got.token_ids == alone.token_ids
        assert got.finish_reason == alone.finish_reason
        if item.sampling.grammar is not None and got.finish_reason == "stop":
            check(item.request_id.partition("-")[0], tokenizer.decode(got.token_ids))
        if item.sampling.grammar is not None and got.finish_reason != "stop":
            assert got.finish_reason == "length"
            assert len(got.token_ids) == item.sampling.max_tokens
    ended = [name for name, got in together.items() if got.finish_reason == "stop"]
    assert {name.partition("-")[0] for name in ended} >= SOURCES.keys()


def test_preempted_sequences_stay_with_their_grammar(grammars: Grammars, tokenizer: Tokenizer) -> None:
    engine = make_engine(grammars, 1, num_blocks=101)
    got = answers(engine, [request(f"json-{seed}", SOURCES["json"]) for seed in range(24)])
    assert engine.scheduler.num_preemptions > 0
    for seed in range(24):
        alone = answers(make_engine(grammars, 0), [request(f"json-{seed}", SOURCES["json"])])
        assert got[f"json-{seed}"].token_ids == alone[f"json-{seed}"].token_ids


@pytest.mark.parametrize("steps_ahead", [0, 1])
class TestEnds:
    LETTERS = grammars_of.source(grammars_of.regex("[ab]{2,4}"))

    def test_the_end_comes_only_where_the_grammar_has_one(self, grammars: Grammars, steps_ahead: int) -> None:
        engine = make_engine(grammars, steps_ahead)
        got = answers(engine, [request(f"x-{seed}", self.LETTERS) for seed in range(60)])
        lengths = {len(delta.token_ids) for delta in got.values()}
        assert lengths == {2, 3, 4}
        assert all(delta.finish_reason == "stop" for delta in got.values())
        assert all((delta.stop_token_id == END) == (len(delta.token_ids) < 4) for delta in got.values())

    def test_min_tokens_holds_it_back(self, grammars: Grammars, steps_ahead: int) -> None:
        engine = make_engine(grammars, steps_ahead)
        got = answers(engine, [request(f"x-{seed}", self.LETTERS, min_tokens=3) for seed in range(30)])
        assert {len(delta.token_ids) for delta in got.values()} == {3, 4}

    def test_a_minimum_beyond_the_grammar_ends_with_the_grammar(
        self, grammars: Grammars, steps_ahead: int
    ) -> None:
        optional = grammars_of.source(grammars_of.grammar('start: "ab" "c"?'))
        got = answers(make_engine(grammars, steps_ahead), [request("x-0", optional, min_tokens=50)])
        assert (len(got["x-0"].token_ids), got["x-0"].finish_reason) == (3, "stop")

    def test_without_an_end_token_the_grammar_still_ends(self, grammars: Grammars, steps_ahead: int) -> None:
        engine = make_engine(grammars, steps_ahead)
        got = answers(engine, [request(f"x-{seed}", self.LETTERS, stop_token_ids=()) for seed in range(9)])
        assert {len(delta.token_ids) for delta in got.values()} == {4}
        assert {delta.finish_reason for delta in got.values()} == {"stop"}

    def test_length_is_told(self, grammars: Grammars, steps_ahead: int) -> None:
        engine = make_engine(grammars, steps_ahead)
        got = answers(engine, [request("x-0", SOURCES["json"], max_tokens=5)])
        assert (len(got["x-0"].token_ids), got["x-0"].finish_reason) == (5, "length")

    def test_a_grammar_that_is_complete_with_the_last_token_has_stopped(
        self, grammars: Grammars, steps_ahead: int
    ) -> None:
        fixed = grammars_of.source(grammars_of.choice(["abcde"]))
        got = answers(make_engine(grammars, steps_ahead), [request("x-0", fixed, max_tokens=5)])
        assert (len(got["x-0"].token_ids), got["x-0"].finish_reason) == (5, "stop")


def test_sequences_side_by_side_get_a_compilation_each(grammars: Grammars) -> None:
    """Shared by those that come one after the other, but not for ever: what it finds out is kept with it."""
    grammar = Grammar(SOURCES["regex"], "guided_regex")

    def groups(num_in_use: int) -> set[int]:
        copies = [grammars.matcher(grammar) for _ in range(num_in_use)]
        assert all(copy.matcher.compute_ff_bytes() == b"" for copy in copies)
        return {copy.group for copy in copies}

    deadline = time.monotonic() + 30
    while len(groups(20)) < 20:
        assert time.monotonic() < deadline
    first = groups(1)
    assert groups(1) == first
    while groups(1) == first:
        assert time.monotonic() < deadline


class TestRefusals:
    @pytest.mark.parametrize(
        ("source", "complaint"),
        [
            (grammars_of.source(grammars_of.regex("(a")), "unclosed group"),
            (grammars_of.source(grammars_of.regex("(?=a)b")), "look-ahead"),
            (grammars_of.source(grammars_of.grammar("start: foo")), "foo"),
            (grammars_of.source(grammars_of.json_schema({"type": "objct"})), "objct"),
            (grammars_of.source(grammars_of.json_schema({"not": {"type": "string"}})), "not"),
            (grammars_of.source(grammars_of.json_schema({"$ref": "https://localhost/x"})), "localhost"),
            ("nonsense", "Expected token"),
            # Each of these would bring a process down, or keep it busy for hours.
            (grammars_of.source(grammars_of.grammar(CHAIN)), "nested too deeply"),
            (grammars_of.source(grammars_of.json_schema({"multipleOf": 123456789})), "takes more than"),
        ],
    )
    def test_a_faulty_grammar_costs_nobody_else_anything(
        self, grammars: Grammars, source: str, complaint: str
    ) -> None:
        engine = make_engine(grammars, 1)
        got = answers(engine, [request("good-1", SOURCES["choice"]), request("bad-2", source)])
        assert got["bad-2"].finish_reason == "refused"
        assert got["bad-2"].param == "response_format"
        assert complaint in (got["bad-2"].error or "")
        assert got["good-1"].finish_reason == "stop"

    def test_the_same_fault_is_told_again(self, grammars: Grammars) -> None:
        grammar = Grammar(grammars_of.source(grammars_of.regex("[a")), "guided_regex")
        for _ in range(2):
            with pytest.raises(GrammarError, match="unclosed"):
                grammars.matcher(grammar)

    def test_what_is_said_of_a_long_grammar_is_short(self, grammars: Grammars) -> None:
        grammar = Grammar(grammars_of.source(grammars_of.regex("[a" + "x?" * 10_000)), "guided_regex")
        with pytest.raises(GrammarError, match="regex") as told:
            grammars.matcher(grammar)
        assert len(str(told.value)) <= 1000

    def test_many_grammars_are_not_all_kept(self, grammars: Grammars) -> None:
        for number in range(200):
            source = grammars_of.source(grammars_of.choice([f"{number}"]))
            grammars.compile(Grammar(source, "guided_choice"))
        assert len(grammars) < 100
