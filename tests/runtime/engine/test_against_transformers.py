"""The engine's greedy tokens are transformers' tokens, however the work is cut up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.catalogue import ModelSpec
from runtime.engine.core import Engine
from runtime.engine.start import start
from runtime.protocol import EngineConfig, SamplingParams, Submit

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "grouped queries, tied head": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "one key head, untied head": {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "as many key heads as heads": {"num_key_value_heads": 6},
    "biases everywhere": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 32},
    "an odd head size": {"head_dim": 20},
    "linear scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama 3.1 scaling": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}
PROMPTS = [[5, 17, 200], list(range(40, 90)), [7] * 33, [3, 1, 4, 1, 5, 9, 2, 6]]
ANSWER = 24
# Keys and values of 16 tokens in 3 layers with 2 key heads of 16 dimensions, in float32.
BLOCK_BYTES = 2 * 16 * 3 * 2 * 16 * 4


def save_random_llama(directory: Path, dtype: torch.dtype, **changes: Any) -> Any:
    """A tiny random Llama, saved by transformers itself; returns it in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 48,
        "intermediate_size": 100,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes))).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    # Read again rather than cast back: a cast to half width rounds the rotary frequencies as well.
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def differences(model: Any, prompts: dict[str, list[int]], answers: dict[str, list[int]]) -> dict[str, int]:
    """Where each answer first leaves what transformers finds likeliest, in one pass over the whole text."""
    assert answers.keys() == prompts.keys()
    first = {}
    for name, prompt in prompts.items():
        assert len(answers[name]) == ANSWER
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answers[name]]), use_cache=False).logits[0]
        likeliest = logits.argmax(-1)[len(prompt) - 1 : -1].tolist()
        wrong = [place for place, token in enumerate(answers[name]) if token != likeliest[place]]
        if wrong:
            first[name] = wrong[0]
    return first


def make_engine(directory: Path, **changes: Any) -> Engine:
    spec = ModelSpec(id="tiny", source=str(directory))
    settings = {"device": "cpu", "kv_cache_bytes": 8 << 20, "max_num_seqs": 16} | changes
    engine, *_ = start(EngineConfig(model=spec, cache_dir=str(directory), **settings), lambda event: None)
    return engine


def submit(engine: Engine, name: str, prompt: list[int], **sampling: Any) -> None:
    params = {"max_tokens": ANSWER, "temperature": 0.0} | sampling
    engine.submit(Submit(request_id=name, prompt_token_ids=prompt, sampling=SamplingParams(**params)))


def run(engine: Engine) -> tuple[dict[str, list[int]], dict[str, list[float]]]:
    """Everybody's tokens, and their log probabilities where they were asked for."""
    tokens: dict[str, list[int]] = {}
    logprobs: dict[str, list[float]] = {}
    while engine.has_work:
        for delta in engine.step().deltas:
            assert delta.error is None
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            logprobs.setdefault(delta.request_id, []).extend(entry.logprob for entry in delta.logprobs)
    return tokens, logprobs


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_tokens_alone_and_together(name: str, tmp_path: Path) -> None:
    model = save_random_llama(tmp_path, torch.float32, **CHECKPOINTS[name])
    engine = make_engine(tmp_path)
    prompts = {f"r{n}": prompt for n, prompt in enumerate(PROMPTS)}
    for each in prompts:
        submit(engine, each, prompts[each])
        assert differences(model, {each: prompts[each]}, run(engine)[0]) == {}
    for each in prompts:
        submit(engine, each, prompts[each])
    assert differences(model, prompts, run(engine)[0]) == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_width_weights_are_used_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    model = save_random_llama(tmp_path, dtype)
    engine = make_engine(tmp_path)
    prompts = {f"r{n}": prompt for n, prompt in enumerate(PROMPTS)}
    for each in prompts:
        submit(engine, each, prompts[each])
    assert differences(model, prompts, run(engine)[0]) == {}


@pytest.mark.parametrize("kernels", ["compiled", "torch"])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 7},
        {"block_size": 32},
        {"enable_prefix_caching": False},
        # Room for little more than one sequence at its longest: the others are put off and resumed.
        {"kv_cache_bytes": 8 * BLOCK_BYTES, "max_model_len": 110, "max_num_batched_tokens": 16},
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 256},
    ],
    ids=["chunks of seven", "large blocks", "no prefix caching", "preempted", "whole prompts"],
)
def test_cutting_up_the_work_changes_nothing(
    settings: dict[str, Any], kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.kernels import native

    model = save_random_llama(tmp_path, torch.float32, num_attention_heads=4, hidden_size=64)
    if kernels == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        assert os.environ.get("CI") != "true", "CI has a C compiler"
        pytest.skip("no C compiler here")
    engine = make_engine(tmp_path, **settings)
    several = [*PROMPTS, [*PROMPTS[1], 9, 9], [*PROMPTS[1][:32], 8]]
    prompts = {f"r{n}": prompt for n, prompt in enumerate(several)}
    for each in prompts:
        submit(engine, each, prompts[each])
    tokens, _ = run(engine)
    assert differences(model, prompts, tokens) == {}
    if "max_model_len" in settings:
        assert engine.stats.preemptions_total > 0
    if settings.get("enable_prefix_caching", True) and "max_model_len" not in settings:
        submit(engine, "again", prompts["r1"])
        assert run(engine)[0]["again"] == tokens["r1"]
        assert engine.stats.cached_tokens_total > 0


def test_an_answer_has_the_same_bits_whatever_else_is_in_the_batch(tmp_path: Path) -> None:
    save_random_llama(tmp_path, torch.float16, hidden_size=64, num_attention_heads=4, intermediate_size=1100)
    wide, narrow = make_engine(tmp_path), make_engine(tmp_path, max_num_batched_tokens=5)
    if wide.runner.tile == 1:
        pytest.skip("the torch kernels make no such promise")
    sampling = {"temperature": 1.0, "seed": 11, "logprobs": 0}
    submit(wide, "it", PROMPTS[1], **sampling)
    alone = run(wide)
    for size in (2, 9, 30):
        engine = wide if size < 30 else narrow
        submit(engine, "it", PROMPTS[1], **sampling)
        for other in range(size):
            submit(engine, f"other{other}", [other + 2] * (other + 1), temperature=0.7, seed=other)
        tokens, logprobs = run(engine)
        assert tokens["it"] == alone[0]["it"]
        assert logprobs["it"] == alone[1]["it"]


def test_log_probabilities_are_the_models_own(tmp_path: Path) -> None:
    model = save_random_llama(tmp_path, torch.float32)
    engine = make_engine(tmp_path, max_num_batched_tokens=16)
    prompt = PROMPTS[1]
    submit(engine, "it", prompt, logprobs=3, prompt_logprobs=2, max_tokens=4, temperature=0.9, seed=5)
    deltas = []
    while engine.has_work:
        deltas += engine.step().deltas
    tokens = [token for delta in deltas for token in delta.token_ids]
    with torch.no_grad():
        expected = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
    (prompt_logprobs,) = [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs]
    assert prompt_logprobs[0] is None
    entries = prompt_logprobs[1:] + [entry for delta in deltas for entry in delta.logprobs]
    assert [entry.token_id for entry in entries if entry] == (prompt + tokens)[1:]
    for position, entry in enumerate(entries):
        assert entry is not None
        row = expected[position]
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
        assert entry.rank == int((row > row[entry.token_id]).sum()) + 1
        best = row.topk(2 if position < len(prompt) - 1 else 3)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
