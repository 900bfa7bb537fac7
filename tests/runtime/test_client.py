"""The client and a real engine process: crashes, clients that leave, starts that fail, the end."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from runtime import client as client_module
from runtime.catalogue import ModelSpec
from runtime.client import EngineClient, EngineUnavailable, TokenStream
from runtime.protocol import EngineConfig, Grammar, SamplingParams, Submit, TokenDelta
from runtime.text import grammar

PROMPT = list(range(40, 90))


def config(directory: Path, **settings: Any) -> EngineConfig:
    spec = ModelSpec(id="tiny", source=str(directory))
    chosen = {"device": "cpu", "kv_cache_bytes": 32 << 20, **settings}
    return EngineConfig(model=spec, cache_dir=str(directory), **chosen)


@asynccontextmanager
async def running(settings: EngineConfig) -> AsyncIterator[EngineClient]:
    client = EngineClient(settings)
    life = asyncio.create_task(client.run())
    try:
        yield client
    finally:
        await client.close(drain_seconds=0)
        await asyncio.wait_for(life, 20)


def submit(client: EngineClient, name: str, max_tokens: int) -> TokenStream:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return client.submit(Submit(request_id=name, prompt_token_ids=PROMPT, sampling=sampling))


async def tokens_of(stream: TokenStream) -> list[int]:
    return [token for deltas in [item async for item in stream] for d in deltas for token in d.token_ids]


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what must come about; a test that waits in vain fails."""
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


def run(test: Awaitable[None]) -> None:
    async def main() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(main())


def submit_held(client: EngineClient, name: str, pattern: str) -> TokenStream:
    """A request whose answer a pattern holds to a form."""
    held = Grammar(grammar.source(grammar.regex(pattern)), "guided_regex")
    sampling = SamplingParams(max_tokens=50, grammar=held)
    return client.submit(Submit(request_id=name, prompt_token_ids=PROMPT, sampling=sampling))


class TestGrammars:
    """They are compiled beside the engine's steps, and only then does it know of their requests."""

    def test_who_leaves_meanwhile_is_forgotten(self, endless_model: Path) -> None:
        async def test() -> None:
            async with running(config(endless_model)) as client:
                await client.wait_ready()
                for number in range(20):
                    submit_held(client, f"left{number}", f"[ab]{{{number + 1}}}").close()
                assert len(await tokens_of(submit_held(client, "stayed", "[ab]{7}"))) == 7
                assert client.in_flight == 0
                await until(lambda: client.stats.blocks_used == 0)

        run(test())

    def test_what_the_first_takes_is_imported_once_there_is_nothing_else_to_do(
        self, tiny_model: Path
    ) -> None:
        async def test() -> None:
            async with running(config(tiny_model)) as client:
                await client.wait_ready()
                mapped = Path(f"/proc/{client.pid}/maps")
                assert "llguidance" not in mapped.read_text()
                assert await tokens_of(submit(client, "first", 4))
                await until(lambda: "llguidance" in mapped.read_text())
                assert len(await tokens_of(submit_held(client, "held", "[ab]{7}"))) == 7

        run(test())

    def test_draining_waits_for_them(self, tiny_model: Path) -> None:
        async def test() -> None:
            client = EngineClient(config(tiny_model))
            life = asyncio.create_task(client.run())
            await client.wait_ready()
            streams = [submit_held(client, f"r{number}", "[ab]{9}") for number in range(3)]
            closing = asyncio.create_task(client.close(drain_seconds=20))
            assert [len(await tokens_of(stream)) for stream in streams] == [9, 9, 9]
            await closing
            await asyncio.wait_for(life, 20)

        run(test())


class TestCrash:
    def test_everyone_is_told_at_once_and_the_next_request_works(self, endless_model: Path) -> None:
        async def test() -> None:
            async with running(config(endless_model)) as client:
                before = await tokens_of(submit(client, "before", 20))
                streams = [submit(client, f"r{number}", 10_000) for number in range(16)]
                for stream in streams:
                    assert (await anext(stream))[0].token_ids
                assert client.pid is not None
                os.kill(client.pid, signal.SIGKILL)
                ends = await asyncio.gather(*map(tokens_of, streams), return_exceptions=True)
                assert [type(end) for end in ends] == [EngineUnavailable] * 16
                assert all("SIGKILL" in str(end) for end in ends)
                assert client.state == "loading"
                assert await tokens_of(submit(client, "after", 20)) == before
                assert (client.state, client.restarts, client.in_flight) == ("warm", 1, 0)

        run(test())

    def test_while_it_loads_it_is_started_again_too(self, tiny_model: Path) -> None:
        async def test() -> None:
            async with running(config(tiny_model)) as client:
                await until(lambda: client.pid is not None)
                assert client.pid is not None
                stream = submit(client, "early", 3)
                os.kill(client.pid, signal.SIGKILL)
                with pytest.raises(EngineUnavailable, match="starting"):
                    await tokens_of(stream)
                assert len(await tokens_of(submit(client, "late", 3))) <= 3

        run(test())

    def test_one_that_never_gets_ready_is_given_up(
        self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(client_module, "MAX_FAILED_STARTS", 2)
        monkeypatch.setattr(sys, "executable", shutil.which("false"))

        async def test() -> None:
            client = EngineClient(config(tiny_model))
            await asyncio.wait_for(client.run(), 20)
            assert client.state == "failed"
            with pytest.raises(EngineUnavailable, match="status 1 while it was starting, 2 times in a row"):
                await client.wait_ready()

        run(test())
        assert capfd.readouterr().err.count("The engine ended with status 1") == 2


class TestLeaving:
    def test_blocks_are_free_again(self, endless_model: Path) -> None:
        async def test() -> None:
            async with running(config(endless_model)) as client:
                streams = [submit(client, f"r{number}", 10_000) for number in range(8)]
                for stream in streams:
                    await anext(stream)
                assert client.stats.blocks_used >= 8
                assert client.stats.running == 8
                for stream in streams[:4]:
                    stream.close()
                await until(lambda: client.stats.running == 4)
                readers = [asyncio.create_task(tokens_of(stream)) for stream in streams[4:]]
                await asyncio.sleep(0)
                for reader in readers:
                    reader.cancel()
                await until(lambda: client.stats.running == 0)
                assert (client.stats.blocks_used, client.stats.waiting, client.in_flight) == (0, 0, 0)

        run(test())

    def test_while_it_waits_for_the_engine(self, tiny_model: Path) -> None:
        async def test() -> None:
            async with running(config(tiny_model)) as client:
                submit(client, "gone", 400).close()
                stayed = await tokens_of(submit(client, "stayed", 5))
                assert stayed
                assert client.stats.prompt_tokens_total == len(PROMPT)

        run(test())


class TestFailure:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"architectures": ["NoSuchModel"], "model_type": "nosuch"}, "NoSuchModel"),
            ({"num_hidden_layers": 3}, "model.layers.2"),
            ({"hidden_size": 48}, "model.embed_tokens.weight"),
        ],
    )
    def test_a_bad_model_says_why_and_is_not_tried_again(
        self,
        tiny_model: Path,
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
        change: dict[str, Any],
        said: str,
    ) -> None:
        directory = shutil.copytree(tiny_model, tmp_path / "model")
        described = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(described | change))

        async def test() -> None:
            client = EngineClient(config(directory))
            life = asyncio.create_task(client.run())
            stream = submit(client, "early", 5)
            with pytest.raises(EngineUnavailable, match=said):
                await client.wait_ready()
            with pytest.raises(EngineUnavailable, match=said):
                await tokens_of(stream)
            await asyncio.wait_for(life, 20)
            assert (client.state, client.restarts) == ("failed", 0)
            with pytest.raises(EngineUnavailable, match=said):
                submit(client, "late", 5)
            await client.close(drain_seconds=0)

        run(test())
        assert "Traceback" not in capfd.readouterr().err

    def test_a_request_that_cannot_be_is_its_senders_problem(self, tiny_model: Path) -> None:
        async def test() -> None:
            async with running(config(tiny_model)) as client:
                sampling = SamplingParams(max_tokens=4)
                bad = client.submit(
                    Submit(request_id="bad", prompt_token_ids=[1, 999_999], sampling=sampling)
                )
                good = submit(client, "good", 4)
                deltas: list[TokenDelta] = [delta async for item in bad for delta in item]
                assert deltas[-1].finish_reason == "refused"
                assert "out of range" in (deltas[-1].error or "")
                assert await tokens_of(good)

        run(test())


class TestEnd:
    def test_draining_finishes_what_was_submitted(self, tiny_model: Path) -> None:
        async def test() -> None:
            client = EngineClient(config(tiny_model))
            life = asyncio.create_task(client.run())
            await client.wait_ready()
            assert client.pid is not None
            process = psutil.Process(client.pid)
            streams = [submit(client, f"r{number}", 100) for number in range(4)]
            readers = [asyncio.create_task(tokens_of(stream)) for stream in streams]
            await asyncio.sleep(0)
            await client.close(drain_seconds=30)
            assert not process.is_running()
            answers = await asyncio.gather(*readers)
            assert all(answers)
            assert answers == [answers[0]] * 4
            with pytest.raises(EngineUnavailable, match="shutting down"):
                submit(client, "late", 5)
            await asyncio.wait_for(life, 20)

        run(test())

    def test_what_takes_too_long_is_cut_off(self, endless_model: Path) -> None:
        async def test() -> None:
            client = EngineClient(config(endless_model))
            life = asyncio.create_task(client.run())
            stream = submit(client, "endless", 10_000)
            await anext(stream)
            await client.close(drain_seconds=0.1)
            with pytest.raises(EngineUnavailable, match="shutting down"):
                await tokens_of(stream)
            await asyncio.wait_for(life, 20)

        run(test())
