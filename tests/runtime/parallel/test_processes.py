"""Real engines of several processes: they answer as one does, and one of them dying ends nothing for good."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from runtime.client import EngineUnavailable
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
