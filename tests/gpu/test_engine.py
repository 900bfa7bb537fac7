"""The engine on a GPU: the reference's tokens, however the work is cut up, replayed or overlapped."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from runtime.engine.core import Engine
from tests.runtime.engine.test_against_transformers import (
    CHECKPOINTS,
    PROMPTS,
    differences,
    make_engine,
    run,
    save_random_llama,
    submit,
)

pytestmark = pytest.mark.gpu
# What the tensor cores take: heads of 16 dimensions and up.
SHAPE: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 192}


def engine_of(directory: Path, **settings: Any) -> Engine:
    return make_engine(directory, **({"device": "cuda", "kv_cache_bytes": 64 << 20} | settings))


def answers(engine: Engine, prompts: dict[str, list[int]], **sampling: Any) -> dict[str, list[int]]:
    for name, prompt in prompts.items():
        submit(engine, name, prompt, **sampling)
    return run(engine)[0]


NAMED = {f"r{n}": prompt for n, prompt in enumerate([*PROMPTS, [*PROMPTS[1], 9, 9], [*PROMPTS[1][:32], 8]])}


@pytest.mark.parametrize("name", ["grouped queries, tied head", "biases everywhere", "llama 3.1 scaling"])
def test_greedy_tokens_are_the_references(name: str, tmp_path: Path) -> None:
    model = save_random_llama(tmp_path, torch.float32, **(CHECKPOINTS[name] | SHAPE))
    engine = engine_of(tmp_path)
    for each, prompt in NAMED.items():
        assert differences(model, {each: prompt}, answers(engine, {each: prompt})) == {}
    assert differences(model, NAMED, answers(engine, NAMED)) == {}


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 7},
        {"block_size": 64},
        {"enable_prefix_caching": False},
        {"kv_cache_bytes": 8 * 2 * 16 * 3 * 2 * 32 * 4, "max_model_len": 110, "max_num_batched_tokens": 16},
        {"max_num_seqs": 3},
    ],
    ids=["chunks of seven", "large blocks", "no prefix caching", "preempted", "three at a time"],
)
@pytest.mark.parametrize("ahead", [False, True], ids=["step by step", "one step ahead"])
def test_cutting_up_the_work_changes_nothing(
    settings: dict[str, Any], ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_random_llama(tmp_path, torch.float32, **SHAPE)
    engine = engine_of(tmp_path, **settings)
    if not ahead:
        monkeypatch.setattr(type(engine.runner), "steps_ahead", 0)  # the plain loop, to compare with
    assert differences(model, NAMED, answers(engine, NAMED)) == {}
    assert differences(model, NAMED, answers(engine, NAMED)) == {}
    if "max_model_len" in settings:
        assert engine.stats.preemptions_total > 0
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.8, "seed": 5},
        {"temperature": 1.0, "seed": 5, "top_p": 0.8, "top_k": 40},
        {"temperature": 0.7, "seed": 5, "min_p": 0.02, "repetition_penalty": 1.2},
        {"temperature": 0.0, "presence_penalty": 1.0, "frequency_penalty": 0.5, "logit_bias": {7: 3.0}},
    ],
    ids=["temperature", "nucleus", "min-p and repetition", "penalties"],
)
def test_a_request_gets_its_tokens_whatever_else_is_in_the_batch(
    sampling: dict[str, Any], tmp_path: Path
) -> None:
    save_random_llama(tmp_path, torch.float32, **SHAPE)
    engine = engine_of(tmp_path)
    alone = answers(engine, {"it": PROMPTS[1]}, **sampling)["it"]
    submit(engine, "it", PROMPTS[1], **sampling)
    for n, prompt in enumerate(PROMPTS):
        submit(engine, f"other{n}", prompt, temperature=0.5, seed=n, top_p=0.9)
    assert run(engine)[0]["it"] == alone
    host = make_engine(tmp_path)
    if sampling["temperature"] == 0.0:
        assert answers(host, {"it": PROMPTS[1]}, **sampling)["it"] == alone


def test_log_probabilities_are_the_models_own(tmp_path: Path) -> None:
    model = save_random_llama(tmp_path, torch.float32, **SHAPE)
    engine = engine_of(tmp_path, max_num_batched_tokens=16)
    prompt = PROMPTS[1]
    submit(engine, "it", prompt, logprobs=3, prompt_logprobs=2, max_tokens=4, temperature=0.9, seed=5)
    submit(engine, "other", PROMPTS[0], max_tokens=9)
    deltas = []
    while engine.has_work:
        deltas += [delta for delta in engine.step().deltas if delta.request_id == "it"]
    tokens = [token for delta in deltas for token in delta.token_ids]
    with torch.no_grad():
        expected = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
    (prompt_logprobs,) = [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs]
    entries = prompt_logprobs[1:] + [entry for delta in deltas for entry in delta.logprobs]
    assert [entry.token_id for entry in entries if entry] == (prompt + tokens)[1:]
    for position, entry in enumerate(entries):
        assert entry is not None
        row = expected[position]
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-3)
        best = row.topk(len(entry.top))
        assert [token for token, _ in entry.top] == best.indices.tolist()


def test_half_width_answers_leave_the_reference_only_where_it_hesitates(tmp_path: Path) -> None:
    model = save_random_llama(tmp_path, torch.bfloat16, **SHAPE)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).cuda().eval()
    told = answers(engine_of(tmp_path), NAMED)
    for name, place in differences(model, NAMED, told).items():
        tokens = torch.tensor([NAMED[name] + told[name][:place]])
        with torch.no_grad():
            row = model(tokens).logits[0, -1]
            # How far another bf16 computation is off here says how closely two tokens can be told apart.
            noise = float((half(tokens.cuda()).logits[0, -1].float().cpu() - row).abs().max())
        margin = float(row.max() - row[told[name][place]])
        assert margin < 3 * noise, f"{name} leaves the reference at {place} by {margin}, noise {noise}"


@pytest.fixture
def eager_collector() -> Iterator[None]:
    """Garbage that lies in cycles is found within few allocations."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50, 1, 1)
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()


@pytest.mark.usefixtures("eager_collector")
def test_an_engine_that_nobody_needs_leaves_room_for_the_next(tmp_path: Path) -> None:
    save_random_llama(tmp_path, torch.float32, **SHAPE)
    told = []
    for _ in range(3):
        engine = engine_of(tmp_path)
        while engine.runner.use_idle_time():  # until every graph is captured
            pass
        told.append(answers(engine, NAMED))
        in_a_cycle: list[object] = [engine]
        in_a_cycle.append(in_a_cycle)
        del engine, in_a_cycle
    assert told == [told[0]] * 3
