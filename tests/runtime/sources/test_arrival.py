"""Engines whose model is still being fetched: right answers, whatever happens on the way."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from runtime.client import EngineClient, EngineUnavailable
from runtime.protocol import EngineConfig, SamplingParams, Submit
from runtime.weights import sources
from tests.runtime.sources.hub_server import HubServer
from tests.runtime.sources.models import spec
from tests.runtime.sources.s3_server import OpenDoor, upload

PROMPT = [84, 104, 101, 32, 99, 97, 116]
MAX_TOKENS = 12
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="session")
def answer(tiny_model: Path) -> list[int]:
    """What transformers says to the prompt."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    prompt = torch.tensor([PROMPT])
    whole = model.generate(prompt, max_new_tokens=MAX_TOKENS, min_new_tokens=MAX_TOKENS, do_sample=False)
    tokens: list[int] = whole[0, len(PROMPT) :].tolist()
    return tokens


@asynccontextmanager
async def engine(source: str, cache_dir: Path, **settings: Any) -> AsyncIterator[EngineClient]:
    chosen = {"device": "cpu", "kv_cache_bytes": 8 << 20, **settings}
    client = EngineClient(EngineConfig(model=spec(source), cache_dir=str(cache_dir), **chosen))
    life = asyncio.create_task(client.run())
    try:
        yield client
    finally:
        await client.close(drain_seconds=0)
        await asyncio.wait_for(life, 30)


async def answer_of(client: EngineClient) -> list[int]:
    sampling = SamplingParams(max_tokens=MAX_TOKENS, min_tokens=MAX_TOKENS, temperature=0.0)
    stream = client.submit(Submit(request_id="r", prompt_token_ids=PROMPT, sampling=sampling))
    return [token for deltas in [item async for item in stream] for d in deltas for token in d.token_ids]


def fetcher_of(client: EngineClient) -> psutil.Process:
    """The process that fetches for the client's engine."""
    (found,) = psutil.Process(client.pid).children()
    return found


class Held:
    """Answers of a server that stop after `after` bytes until `released`."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.reached = threading.Event()
        self._released = threading.Event()

    def fault(self, **others: Any) -> dict[str, Any]:
        return {"pause": self._pause, "pause_after": self.after, **others}

    def release(self) -> None:
        self._released.set()

    def _pause(self) -> None:
        self.reached.set()
        self._released.wait(60)


def test_text_can_be_read_while_the_weights_come_and_the_answer_is_right(
    hub: HubServer, tiny_model: Path, cache_dir: Path, answer: list[int]
) -> None:
    hub.add_repo("org/name", tiny_model)
    held = Held(20_000)
    hub.fail("/storage/", **held.fault())

    async def test() -> None:
        async with engine("hf://org/name", cache_dir) as client:
            directory = await client.wait_directory()
            assert (directory / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
            assert await asyncio.to_thread(held.reached.wait, 30)
            assert not (directory / WEIGHTS).exists()
            assert client.progress.phase == "download"
            assert 0 < client.progress.bytes_done < client.progress.bytes_total
            held.release()
            assert await answer_of(client) == answer

    asyncio.run(test())
    assert hub.body_bytes("/storage/") == (tiny_model / WEIGHTS).stat().st_size


def test_a_fetch_that_is_given_up_leaves_what_came(hub: HubServer, tiny_model: Path, cache_dir: Path) -> None:
    hub.add_repo("org/name", tiny_model)
    held = Held(20_000)
    hub.fail("/storage/", **held.fault())
    others = psutil.Process().children()  # of other tests
    arrival = sources.arrive(spec("hf://org/name"), cache_dir, lambda progress: None)
    directory = arrival.directory
    assert held.reached.wait(30)
    assert len(psutil.Process().children()) > len(others)
    arrival.give_up()
    assert set(psutil.Process().children()) <= set(others)
    assert (directory / "config.json").read_bytes() == (tiny_model / "config.json").read_bytes()
    assert not (directory / WEIGHTS).exists()
    held.release()
    assert sources.fetch(spec("hf://org/name"), cache_dir) == directory
    assert (directory / WEIGHTS).read_bytes() == (tiny_model / WEIGHTS).read_bytes()


def test_a_header_that_arrived_wrong_is_read_again(
    hub: HubServer, tiny_model: Path, cache_dir: Path, answer: list[int]
) -> None:
    hub.add_repo("org/name", tiny_model)
    hub.fail("/storage/", corrupt=True, corrupt_at=3)

    async def test() -> None:
        async with engine("hf://org/name", cache_dir) as client:
            assert await answer_of(client) == answer
            assert client.restarts == 0

    asyncio.run(test())


def test_weights_that_arrive_wrong_every_time_are_refused(
    hub: HubServer, tiny_model: Path, cache_dir: Path
) -> None:
    hub.add_repo("org/name", tiny_model)
    hub.fail("/storage/", corrupt=True, corrupt_at=30_000, times=9)

    async def test() -> None:
        async with engine("hf://org/name", cache_dir) as client:
            said = ""
            while client.state != "failed":
                # Whoever waits is told the first time, too, when there is still another try.
                with pytest.raises(EngineUnavailable, match=r"model\.safetensors arrived") as caught:
                    await client.wait_verified()
                said = str(caught.value)
            assert "model.safetensors arrived twice with another content" in said

    asyncio.run(test())


@pytest.mark.parametrize("victim", ["engine", "fetcher"])
def test_after_kill_9_only_what_is_missing_comes_again(
    hub: HubServer, tiny_model: Path, cache_dir: Path, answer: list[int], victim: str
) -> None:
    hub.add_repo("org/name", tiny_model)
    held = Held(20_000)
    hub.fail("/storage/", **held.fault())

    async def test() -> None:
        async with engine("hf://org/name", cache_dir) as client:
            assert await asyncio.to_thread(held.reached.wait, 30)
            assert client.info is None
            fetcher = fetcher_of(client)
            os.kill(fetcher.pid if victim == "fetcher" else client.pid or 0, signal.SIGKILL)
            await asyncio.to_thread(fetcher.wait, 10)
            await client.wait_ready()
            assert await answer_of(client) == answer
            assert client.restarts == (victim == "engine")

    asyncio.run(test())
    held.release()


@pytest.mark.parametrize("moves", [False, True])
def test_ranks_have_one_version_and_fetch_it_once(
    hub: HubServer, tiny_model: Path, cache_dir: Path, answer: list[int], moves: bool
) -> None:
    hub.add_repo("org/name", tiny_model)
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir()}

    # Both ask before either is answered: what the first one has fetched is there for the second.
    both = threading.Barrier(2, timeout=60)

    def move() -> None:
        both.wait()
        hub.add_repo("org/name", files | {"generation_config.json": b'{"top_k": 7}'})

    if moves:  # between the answer to the first rank and that to the second
        hub.fail("/revision/main", pause=both.wait)
        hub.fail("/revision/main", before=move)

    async def test() -> None:
        async with engine("hf://org/name", cache_dir, world_size=2) as client:
            await client.wait_ready()
            assert await answer_of(client) == answer
            assert client.restarts == moves

    asyncio.run(test())
    if not moves:
        assert hub.body_bytes("/storage/") == len(files[WEIGHTS])


def test_a_source_that_is_not_there_is_named(hub: HubServer, cache_dir: Path) -> None:
    async def test() -> None:
        async with engine("hf://org/none", cache_dir) as client:
            with pytest.raises(EngineUnavailable, match=r"hf://org/none was not found on http://127"):
                await answer_of(client)

    asyncio.run(test())


def test_a_checkpoint_that_is_wrong_at_its_source_is_named(
    hub: HubServer, tiny_model: Path, cache_dir: Path
) -> None:
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    hub.add_repo("org/name", files | {WEIGHTS: b"\xff" * 5000})

    async def test() -> None:
        async with engine("hf://org/name", cache_dir) as client:
            with pytest.raises(EngineUnavailable, match=r"model\.safetensors: the header claims"):
                await answer_of(client)

    asyncio.run(test())


def test_from_s3_too(s3: Any, tiny_model: Path, cache_dir: Path, answer: list[int], door: OpenDoor) -> None:
    upload(s3, {path.name: path.read_bytes() for path in tiny_model.iterdir()})
    opened = door("cut", times=1, after=20_000)

    async def test() -> None:
        async with engine("s3://models/org/name", cache_dir) as client:
            assert await answer_of(client) == answer

    asyncio.run(test())
    assert opened.body_bytes <= (tiny_model / WEIGHTS).stat().st_size + 20_000
