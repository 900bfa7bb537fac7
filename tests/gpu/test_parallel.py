"""Engines of two and four GPUs: the reference's tokens through NCCL and through shared memory, and faults."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if torch.cuda.device_count() < 2:
    pytest.skip("fewer than two GPUs", allow_module_level=True)

from runtime.client import EngineClient, EngineUnavailable
from runtime.protocol import SamplingParams, Submit
from tests.runtime.engine.test_against_transformers import ANSWER, PROMPTS, differences, save_random_llama
from tests.runtime.test_client import config, run, running, submit, tokens_of

pytestmark = pytest.mark.gpu
SIZES = [size for size in (2, 4) if size <= torch.cuda.device_count()]
SHAPE: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 384}
FEW = {f"r{n}": prompt for n, prompt in enumerate(PROMPTS)}
# More sequences than one-shot sums take, and more prompt tokens than one launch of two-shot sums.
MANY = {f"r{n}": [*PROMPTS[1], 3, n + 1, *PROMPTS[1][: n % 40]] for n in range(60)}


async def answers(client: EngineClient, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    sampling = SamplingParams(max_tokens=ANSWER, temperature=0.0)
    streams = [
        client.submit(Submit(request_id=name, prompt_token_ids=prompt, sampling=sampling))
        for name, prompt in prompts.items()
    ]
    return dict(zip(prompts, await asyncio.gather(*map(tokens_of, streams)), strict=True))


@pytest.mark.parametrize("world_size", SIZES)
def test_float32_answers_are_the_references(world_size: int, tmp_path: Path) -> None:
    model = save_random_llama(tmp_path, torch.float32, **SHAPE)

    async def test() -> None:
        async with running(config(tmp_path, device="cuda", world_size=world_size)) as client:
            assert differences(model, FEW, await answers(client, FEW)) == {}
            assert differences(model, MANY, await answers(client, MANY)) == {}

    run(test())


@pytest.mark.parametrize("world_size", SIZES)
def test_half_width_answers_leave_the_reference_only_where_it_hesitates(
    world_size: int, tmp_path: Path
) -> None:
    model = save_random_llama(tmp_path, torch.bfloat16, **SHAPE)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).cuda().eval()
    told: list[dict[str, list[int]]] = []

    async def test() -> None:
        async with running(config(tmp_path, device="cuda", world_size=world_size)) as client:
            told.extend(
                [await answers(client, FEW), await answers(client, MANY), await answers(client, MANY)]
            )

    run(test())
    for prompts, tokens in zip((FEW, MANY, MANY), told, strict=True):
        for name, place in differences(model, prompts, tokens).items():
            text = torch.tensor([prompts[name] + tokens[name][:place]])
            with torch.no_grad():
                row = model(text).logits[0, -1]
                # How far another bf16 computation is off says how closely two tokens can be told apart.
                noise = float((half(text.cuda()).logits[0, -1].float().cpu() - row).abs().max())
            margin = float(row.max() - row[tokens[name][place]])
            assert margin < 3 * noise, f"{name} leaves the reference at {place} by {margin}, noise {noise}"


def test_a_rank_that_is_killed_while_it_serves(tmp_path: Path) -> None:
    save_random_llama(tmp_path, torch.bfloat16, **SHAPE, max_position_embeddings=1 << 16)

    async def test() -> None:
        async with running(config(tmp_path, device="cuda", world_size=2)) as client:
            before = await tokens_of(submit(client, "before", 20))
            streams = [submit(client, f"r{number}", 60_000) for number in range(4)]
            for stream in streams:
                assert await anext(stream)
            os.kill(client.pids[1], signal.SIGKILL)
            async with asyncio.timeout(10):
                ends = await asyncio.gather(*map(tokens_of, streams), return_exceptions=True)
            assert [type(end) for end in ends] == [EngineUnavailable] * 4
            assert await tokens_of(submit(client, "after", 20)) == before

    run(test())


@pytest.mark.parametrize("world_size", SIZES)
def test_ranks_draw_the_same_tokens(world_size: int, tmp_path: Path) -> None:
    """Whatever a request asks for, no rank draws another token than rank 0: that would end the engine."""
    save_random_llama(tmp_path, torch.bfloat16, **SHAPE)
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "seed": 5},
        {"temperature": 1.5, "top_k": 7, "min_p": 0.02, "logprobs": 3},
        {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {7: 3.0}},
        {"temperature": 0.0, "prompt_logprobs": 2, "logprobs": 0},
    ]

    async def test() -> None:
        async with running(config(tmp_path, device="cuda", world_size=world_size)) as client:
            streams = []
            for number in range(50):
                sampling = SamplingParams(max_tokens=30 + number % 7, **kinds[number % len(kinds)])
                prompt = PROMPTS[number % len(PROMPTS)]
                request = Submit(request_id=f"r{number}", prompt_token_ids=prompt, sampling=sampling)
                streams.append(client.submit(request))
            found = await asyncio.gather(*map(tokens_of, streams))
            assert [len(tokens) for tokens in found] == [30 + number % 7 for number in range(50)]
            assert client.restarts == 0

    run(test())


def test_more_ranks_than_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random_llama(tmp_path, torch.bfloat16, **SHAPE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    async def test() -> None:
        async with running(config(tmp_path, device="auto", world_size=2)) as client:
            with pytest.raises(EngineUnavailable, match="needs 2 GPUs, and there is 1"):
                await client.wait_ready()

    run(test())


def test_with_kernels_compiled_ahead_ranks_compile_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_random_llama(tmp_path, torch.bfloat16, **SHAPE)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))
    major, minor = torch.cuda.get_device_capability()
    compiling = (
        "import sys; from pathlib import Path; from runtime.engine.kernels_ahead import compile_kernels;"
        f"compile_kernels(Path({str(tmp_path)!r}), {major}{minor}, 2)"
    )
    done = subprocess.run([sys.executable, "-c", compiling], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0

    async def test() -> None:
        async with running(config(tmp_path, device="cuda", world_size=2)) as client:
            info = await client.wait_ready()
            assert info.counters["kernels_compiled"] == 0

    run(test())
