"""Continuous batching under random traffic, with a model whose next token depends on every cached token.

The stand-in for the model keeps token ids where a real one keeps keys and values, and reads a
sequence's whole history back through its block table. A block that is lost, shared wrongly or written
by another sequence therefore changes tokens, and every request is compared with what it gets alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine.blocks import BlockManager
from runtime.engine.core import Engine
from runtime.engine.grammar.grammars import Grammars
from runtime.engine.scheduler import Scheduled, Scheduler
from runtime.engine.step import StepResult, TokenMasks
from runtime.protocol import SamplingParams, Submit

VOCAB = 97
STOP = 13


def next_token(history: Rows[int]) -> int:
    """What the stand-in model says after these tokens."""
    state = 7
    for token in history:
        state = (state * 31 + token + 1) % 1_000_003
    return state % VOCAB


def alone(prompt: list[int], max_tokens: int) -> list[int]:
    """The greedy answer of the stand-in, computed without any engine."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        token = next_token(tokens)
        if token == STOP:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@dataclass
class Promised:
    """A step of the stand-in. Its tokens are made known only when they are asked for."""

    tokens: list[int]

    def sample(self, masks: TokenMasks | None = None) -> None:
        assert masks is None, "nobody here has a grammar"

    def result(self) -> StepResult:
        return StepResult(tokens=self.tokens, logprobs=[None] * len(self.tokens))


class HistoryModel:
    """Takes the place of the runner: a cache of token ids in blocks, and the last tokens by slot."""

    vocab_size = VOCAB

    def __init__(self, num_blocks: int, block_size: int, steps_ahead: int, num_slots: int) -> None:
        self.steps_ahead = steps_ahead
        self.block_size = block_size
        self.memory = np.full((num_blocks, block_size), -1)
        self.last_token = [-1] * num_slots
        self.batches: list[int] = []

    def use_idle_time(self) -> bool:
        return False

    def launch(self, scheduled: Rows[Scheduled]) -> Promised:
        self.batches.append(sum(item.num_new for item in scheduled))
        assert len({item.sequence.slot for item in scheduled}) == len(scheduled), "a slot is one sequence's"
        for item in scheduled:
            sequence, table = item.sequence, item.sequence.table.block_ids
            known = sequence.token_ids[item.start : item.start + item.num_new]
            new = [self.last_token[sequence.slot]] if item.decodes else known
            assert len(new) == item.num_new
            for position, token in enumerate(new, item.start):
                self.memory[table[position // self.block_size], position % self.block_size] = token
        tokens = []
        for item in scheduled:
            if item.samples:
                blocks = item.sequence.table.block_ids
                history = self.memory[blocks].reshape(-1)[: item.start + item.num_new]
                token = next_token(history.tolist())
                self.last_token[item.sequence.slot] = token
                tokens.append(token)
        return Promised(tokens)


def make_engine(
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    budget: int = 16,
    chunked: bool = True,
    prefix_caching: bool = True,
    max_model_len: int = 64,
    steps_ahead: int = 0,
) -> Engine:
    model = HistoryModel(num_blocks, block_size, steps_ahead, max_num_seqs)
    blocks = BlockManager(num_blocks, block_size, prefix_caching)
    scheduler = Scheduler(blocks, max_num_seqs, budget, chunked)
    no_grammars = Grammars(Path("/nowhere"), VOCAB)
    return Engine(model, scheduler, max_model_len, 0, no_grammars)


def request(name: str, prompt: list[int], max_tokens: int, salt: str = "", priority: int = 0) -> Submit:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=(STOP,))
    return Submit(
        request_id=name, prompt_token_ids=prompt, sampling=sampling, cache_salt=salt, priority=priority
    )


def collect(engine: Engine, outputs: dict[str, list[int]], ended: dict[str, str]) -> None:
    for delta in engine.step().deltas:
        assert delta.request_id not in ended, "nothing comes after the end"
        outputs.setdefault(delta.request_id, []).extend(delta.token_ids)
        if delta.finish_reason is not None:
            ended[delta.request_id] = delta.finish_reason


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    block_size=st.sampled_from([1, 2, 4, 16]),
    pool=st.integers(0, 40),
    max_num_seqs=st.integers(1, 12),
    budget=st.integers(1, 40),
    prefix_caching=st.booleans(),
    chunked=st.booleans(),
    steps_ahead=st.integers(0, 1),
)
def test_everyone_ends_with_the_tokens_they_would_get_alone(
    seed: int,
    block_size: int,
    pool: int,
    max_num_seqs: int,
    budget: int,
    prefix_caching: bool,
    chunked: bool,
    steps_ahead: int,
) -> None:
    rnd = random.Random(seed)
    max_model_len = 48
    # At least room for one sequence at its longest; often not for two.
    num_blocks = -(-max_model_len // block_size) + pool // block_size
    budget = budget if chunked else max(budget, max_model_len)
    engine = make_engine(
        num_blocks, block_size, max_num_seqs, budget, chunked, prefix_caching, max_model_len, steps_ahead
    )
    preambles = [[rnd.randrange(VOCAB) for _ in range(20)] for _ in range(2)]
    expected: dict[str, list[int]] = {}
    outputs: dict[str, list[int]] = {}
    ended: dict[str, str] = {}
    aborted: set[str] = set()
    for number in range(50):
        prompt = rnd.choice(preambles)[: rnd.randrange(21)] + [
            rnd.randrange(VOCAB) for _ in range(rnd.randint(1, 20))
        ]
        max_tokens = rnd.randint(1, max_model_len - len(prompt))
        name = f"r{number}"
        expected[name] = alone(prompt, max_tokens)
        salt, priority = rnd.choice(["", "tenant"]), rnd.randint(-1, 1)
        engine.submit(request(name, prompt, max_tokens, salt, priority))
        for _ in range(rnd.choice([0, 0, 1, 3, 10])):
            if engine.has_work:
                collect(engine, outputs, ended)
        if rnd.random() < 0.15:
            victim = f"r{rnd.randrange(number + 1)}"
            if victim not in ended:
                aborted.add(victim)
                ended[victim] = "abort"
                engine.abort([victim])
        assert len(engine.scheduler.running) <= max_num_seqs
    steps = 0
    while engine.has_work:
        collect(engine, outputs, ended)
        steps += 1
        assert steps < 50_000, "somebody starves"
    for name, tokens in expected.items():
        if name in aborted:
            assert outputs.get(name, []) == tokens[: len(outputs.get(name, []))]
        else:
            assert outputs.get(name, []) == tokens
            assert ended[name] in ("stop", "length")
    assert engine.scheduler.blocks.num_free == num_blocks, "every block has come back"
    assert max(engine.runner.batches) <= budget  # type: ignore[attr-defined]  # a stand-in runner


def test_a_shared_prefix_is_computed_once() -> None:
    engine = make_engine(num_blocks=64, budget=64)
    preamble = list(range(20))
    outputs: dict[str, list[int]] = {}
    for name in ("first", "second"):
        engine.submit(request(name, [*preamble, 50, 51], 3))
        while engine.has_work:
            for delta in engine.step().deltas:
                outputs.setdefault(name, []).extend(delta.token_ids)
                if name == "second" and delta.num_cached_tokens:
                    assert delta.num_cached_tokens == 20
    assert outputs["first"] == outputs["second"] == alone([*preamble, 50, 51], 3)
    assert engine.stats.cached_tokens_total == 20


def test_tenants_do_not_share_blocks() -> None:
    engine = make_engine(num_blocks=64, budget=64)
    for salt in ("one", "two"):
        engine.submit(request(salt, list(range(30)), 1, salt=salt))
        while engine.has_work:
            engine.step()
    assert engine.stats.cached_tokens_total == 0


def test_lower_priorities_are_taken_up_first_and_equals_in_turn() -> None:
    engine = make_engine(max_num_seqs=1)
    for name, priority in (("a", 0), ("b", 0), ("c", -1), ("d", 5), ("e", -1), ("f", 0)):
        engine.submit(request(name, [1, 2, 3], 3, priority=priority))
    outputs: dict[str, list[int]] = {}
    ended: dict[str, str] = {}
    while engine.has_work:
        collect(engine, outputs, ended)
    assert list(ended) == ["c", "e", "a", "b", "f", "d"]


def test_a_running_answer_goes_on_while_a_long_prompt_comes_in() -> None:
    engine = make_engine(num_blocks=64, budget=8)
    engine.submit(request("talker", [1], 20))
    engine.step()
    engine.submit(request("reader", list(range(40)), 1))
    talker = alone([1], 20)
    for position in range(1, 5):
        (delta,) = engine.step().deltas
        assert (delta.request_id, delta.token_ids) == ("talker", [talker[position]])


def test_blocks_run_out_and_the_oldest_goes_on() -> None:
    engine = make_engine(num_blocks=13, block_size=4, budget=64, max_model_len=52)
    prompts = {f"r{n}": [n] * 16 for n in range(3)}
    outputs: dict[str, list[int]] = {}
    ended: dict[str, str] = {}
    for name, prompt in prompts.items():
        engine.submit(request(name, prompt, 30))
    while engine.has_work:
        collect(engine, outputs, ended)
    assert engine.stats.preemptions_total > 0
    assert outputs == {name: alone(prompt, 30) for name, prompt in prompts.items()}


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [([], "empty"), ([1] * 64, "at most 64"), ([VOCAB], "out of range"), ([-1], "out of range")],
)
def test_a_bad_request_costs_nobody_else_anything(prompt: list[int], complaint: str) -> None:
    engine = make_engine()
    engine.submit(request("good", [1, 2, 3], 4))
    engine.submit(request("bad", prompt, 4))
    errors: list[str] = []
    tokens: list[int] = []
    while engine.has_work:
        for delta in engine.step().deltas:
            if delta.request_id == "bad":
                assert delta.finish_reason == "refused"
                errors.append(delta.error or "")
            else:
                tokens += delta.token_ids
    assert tokens == alone([1, 2, 3], 4)
    assert len(errors) == 1
    assert complaint in errors[0]
