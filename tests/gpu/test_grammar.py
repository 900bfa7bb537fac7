"""Grammars on a GPU that works a step ahead: masks come in time, and to nobody but those they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from runtime.engine.core import Engine
from runtime.engine.gpu.runner import DeviceRunner
from runtime.text.tokenizer import Tokenizer
from tests.conftest import CONFIG, write_tokenizer
from tests.gpu.test_engine import SHAPE, engine_of
from tests.runtime.engine.grammar.test_grammars import SOURCES, answers, check, request
from tests.runtime.engine.test_against_transformers import make_engine, save_random_llama

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    special = {"vocab_size": CONFIG["vocab_size"], "eos_token_id": CONFIG["eos_token_id"]}
    save_random_llama(directory, torch.float32, **SHAPE, **special, max_position_embeddings=512)
    write_tokenizer(directory)
    return directory


def engine(directory: Path, **settings: Any) -> Engine:
    return engine_of(directory, **({"max_num_seqs": 96} | settings))


def test_greedy_answers_are_the_cpus(directory: Path) -> None:
    wanted = [request(f"{kind}-1", source, 60, temperature=0.0) for kind, source in SOURCES.items()]
    on_gpu = answers(engine(directory), wanted)
    on_cpu = answers(make_engine(directory), wanted)
    assert {name: delta.token_ids for name, delta in on_gpu.items()} == {
        name: delta.token_ids for name, delta in on_cpu.items()
    }


@pytest.mark.parametrize("ahead", [0, 1], ids=["step by step", "one step ahead"])
def test_64_held_answers_beside_free_ones(
    directory: Path, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At temperature 2, some cut, some penalised, in slots that change hands, with graphs and without."""
    monkeypatch.setattr(DeviceRunner, "steps_ahead", ahead)
    tokenizer = Tokenizer.load(directory)
    wishes: list[dict[str, Any]] = [
        {},
        {"top_k": 20},
        {"top_p": 0.8, "min_p": 0.01},
        {"repetition_penalty": 1.2, "min_tokens": 4, "logit_bias": {40: 3.0}},
        {"logprobs": 3},
    ]
    requests = [
        request(f"{kind}-{seed}", source, temperature=2.0, **wishes[seed % len(wishes)])
        for seed in range(13)
        for kind, source in SOURCES.items()
    ]
    free = [request(f"free-{seed}", None, 50, temperature=1.0, stop_token_ids=()) for seed in range(32)]
    alone = {item.request_id: answers(engine(directory), [item]) for item in free[:2]}
    together = answers(engine(directory), [*requests, *free])
    for item in requests:
        got = together[item.request_id]
        assert got.error is None
        if got.finish_reason == "stop":
            check(item.request_id.partition("-")[0], tokenizer.decode(got.token_ids))
        else:
            assert (got.finish_reason, len(got.token_ids)) == ("length", item.sampling.max_tokens)
    assert sum(got.finish_reason == "stop" for got in together.values()) > 40
    for name, found in alone.items():
        assert together[name].token_ids == found[name].token_ids


def test_words_of_several_tokens_and_all_but_a_few_tokens_are_ruled_out(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a grammar; whether the engine works ahead changes nothing."""
    allowed = tuple(range(64, 90))
    words = ((64, 65), (65, 65), (70, 71, 72), (80, 80))
    requests = [
        request(f"{kind}-{seed}", SOURCES[kind] if kind == "regex" else None, 50, temperature=1.0, **rules)
        for seed in range(12)
        for kind, rules in {
            "allowed": {"allowed_token_ids": allowed},
            "bad": {"allowed_token_ids": allowed, "bad_words": words},
            "regex": {"bad_words": words},
        }.items()
    ]
    ahead = answers(engine(directory), requests)
    monkeypatch.setattr(DeviceRunner, "steps_ahead", 0)
    plain = answers(engine(directory), requests)
    assert {name: delta.token_ids for name, delta in ahead.items()} == {
        name: delta.token_ids for name, delta in plain.items()
    }
    for item in requests:
        ids = plain[item.request_id].token_ids
        pairs = [ids[at : at + len(word)] for word in words for at in range(len(ids))]
        assert not item.sampling.bad_words or not any(tuple(found) in words for found in pairs)
        assert not item.sampling.allowed_token_ids or set(ids) <= set(allowed)


def test_working_ahead_and_being_preempted_change_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(f"json-{seed}", SOURCES["json"], temperature=1.5) for seed in range(24)]
    with monkeypatch.context() as patch:
        patch.setattr(DeviceRunner, "steps_ahead", 0)
        plain = answers(engine(directory), requests)
    small = engine(directory, kv_cache_bytes=40 * 2 * 16 * 3 * 2 * 32 * 4, max_model_len=256)
    tight = answers(small, requests)
    ahead = answers(engine(directory), requests)
    assert small.stats.preemptions_total > 0
    for name, delta in plain.items():
        assert ahead[name].token_ids == delta.token_ids
        assert tight[name].token_ids == delta.token_ids
