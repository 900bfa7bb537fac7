"""Real engines of several processes: they answer as one does, and one of them dying ends nothing for good."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import psutil
import pytest

from runtime.client import EngineUnavailable
from runtime.processes import TOKEN
from runtime.protocol import Grammar, SamplingParams, Submit
from runtime.text import grammar as grammars
from tests.runtime.test_client import config, run, running, submit, tokens_of, until


def test_two_ranks_answer_as_one_does(endless_model: Path) -> None:
    async def test() -> None:
        answers = []
        for world_size in (1, 2):
            async with running(config(endless_model, world_size=world_size)) as client:
                streams = [submit(client, f"r{number}", 20 + number) for number in range(4)]
                answers.append(await asyncio.gather(*map(tokens_of, streams)))
                assert len(client.pids) == world_size
        assert answers[0] == answers[1]

    run(test())


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_while_it_serves(endless_model: Path, victim: int) -> None:
    async def test() -> None:
        async with running(config(endless_model, world_size=2)) as client:
            before = await tokens_of(submit(client, "before", 20))
            streams = [submit(client, f"r{number}", 10_000) for number in range(4)]
            for stream in streams:
                assert await anext(stream)
            ranks = [psutil.Process(pid) for pid in client.pids]
            os.kill(client.pids[victim], signal.SIGKILL)
            async with asyncio.timeout(5):
                ends = await asyncio.gather(*map(tokens_of, streams), return_exceptions=True)
            assert [type(end) for end in ends] == [EngineUnavailable] * 4
            assert all(f"Rank {victim} of the engine ended by signal SIGKILL" in str(end) for end in ends)
            assert not any(rank.is_running() for rank in ranks)
            assert await tokens_of(submit(client, "after", 20)) == before
            assert (client.state, client.restarts, client.in_flight) == ("warm", 1, 0)

    run(test())


def test_a_rank_that_is_killed_while_it_loads(endless_model: Path) -> None:
    async def test() -> None:
        async with running(config(endless_model, world_size=2)) as client:
            await until(lambda: len(client.pids) == 2)
            stream = submit(client, "early", 3)
            os.kill(client.pids[1], signal.SIGKILL)
            with pytest.raises(EngineUnavailable, match=r"Rank 1 of the engine .* while it was starting"):
                await tokens_of(stream)
            assert len(await tokens_of(submit(client, "late", 3))) == 3

    run(test())


def test_a_rank_that_is_killed_while_it_sleeps(tiny_model: Path) -> None:
    async def test() -> None:
        async with running(config(tiny_model, world_size=2)) as client:
            before = await tokens_of(submit(client, "before", 20))
            await client.sleep(1)
            ranks = [psutil.Process(pid) for pid in client.pids]
            os.kill(client.pids[1], signal.SIGKILL)
            await until(lambda: client.state == "cold")
            assert not any(rank.is_running() for rank in ranks)
            assert await tokens_of(submit(client, "after", 20)) == before

    run(test())


def test_a_step_that_hangs(endless_model: Path) -> None:
    async def test() -> None:
        async with running(config(endless_model, world_size=2, stuck_after_s=2.0)) as client:
            stream = submit(client, "it", 10_000)
            await anext(stream)
            os.kill(client.pids[1], signal.SIGSTOP)
            with pytest.raises(EngineUnavailable, match="A step has taken longer than 2 s"):
                await tokens_of(stream)
            assert len(await tokens_of(submit(client, "after", 3))) == 3

    run(test())


def test_a_size_that_does_not_fit(tiny_model: Path) -> None:
    async def test() -> None:
        async with running(config(tiny_model, world_size=3)) as client:
            with pytest.raises(EngineUnavailable, match=r"3 does not fit .* These sizes fit: \[1, 2, 4\]"):
                await client.wait_ready()
            assert (client.state, client.restarts) == ("failed", 0)

    run(test())


def test_ranks_sleep_wake_and_follow_grammars_together(tiny_model: Path) -> None:
    def constrained(name: str, pattern: str) -> Submit:
        grammar = Grammar(grammars.source(grammars.regex(pattern)), "guided_regex")
        sampling = SamplingParams(max_tokens=40, seed=3, stop_token_ids=(258,), grammar=grammar)
        return Submit(request_id=name, prompt_token_ids=[70, 71, 72], sampling=sampling)

    async def test() -> None:
        answers = []
        for world_size in (1, 2):
            async with running(config(tiny_model, world_size=world_size)) as client:
                free = [submit(client, f"free{n}", 30) for n in range(3)]
                bound = [
                    client.submit(constrained(f"bound{n}", f"[a-{'xyz'[n]}]{{{n + 4}}}")) for n in range(3)
                ]
                left = client.submit(constrained("left", "[0-9]{30}"))
                left.close()
                texts = [await tokens_of(stream) for stream in (*free, *bound)]
                for level in (1, 2):
                    await client.sleep(level)  # type: ignore[arg-type]
                    again = client.submit(constrained(f"again{level}", "(yes|no)"))
                    texts += [await tokens_of(again), await tokens_of(submit(client, f"free-{level}", 30))]
                answers.append(texts)
                assert (client.restarts, client.wakes) == (0, 2)
        assert answers[0] == answers[1]
        assert [len(text) for text in answers[0][3:6]] == [4, 5, 6]

    run(test())


def test_a_launcher_spreads_the_ranks(endless_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hosts, as far as their environment says; each starts the rank that is its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launcher = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), TOKEN: "a secret"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    settings = config(endless_model, world_size=2)

    async def test() -> None:
        monkeypatch.setenv("RANK", "1")
        async with running(settings) as second:
            await until(lambda: bool(second.pids))
            monkeypatch.setenv("RANK", "0")
            async with running(settings) as first:
                assert len(await tokens_of(submit(first, "it", 20))) == 20
                assert (len(first.pids), len(second.pids), second.state) == (1, 1, "loading")

    run(test())
