"""Falling asleep and waking, seen through the client: what goes, what stays, who waits for whom."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file, save_file

from runtime.client import EngineClient, EngineUnavailable
from runtime.protocol import SamplingParams, Submit
from tests.runtime.test_client import config, run, running, submit, tokens_of, until


@pytest.mark.parametrize("level", [1, 2])
def test_answers_are_the_same_after_a_sleep(level: int, tiny_model: Path) -> None:
    async def test() -> None:
        async with running(config(tiny_model)) as client:
            before = await tokens_of(submit(client, "before", 40))
            await client.sleep(level)  # type: ignore[arg-type]
            assert (client.state, client.sleep_level) == ("asleep", level)
            assert await tokens_of(submit(client, "after", 40)) == before
            assert (client.state, client.sleep_level, client.wakes, client.restarts) == ("warm", None, 1, 0)
            # What was in the cache is gone, and nobody is told that it is not.
            assert client.stats.cached_tokens_total == 0
            assert await tokens_of(submit(client, "cached", 40)) == before
            assert client.stats.cached_tokens_total > 0

    run(test())


def test_the_cache_is_given_back(endless_model: Path) -> None:
    async def test() -> None:
        async with running(config(endless_model, max_model_len=2000)) as client:
            await tokens_of(submit(client, "short", 5))
            assert client.pid is not None
            process = psutil.Process(client.pid)
            idle = process.memory_info().rss
            sampling = SamplingParams(max_tokens=1, temperature=0.0)
            for number in range(20):
                prompt = [number, *(index % 250 for index in range(1500))]
                one = Submit(request_id=f"r{number}", prompt_token_ids=prompt, sampling=sampling)
                await tokens_of(client.submit(one))
            full = process.memory_info().rss
            assert full > idle + (4 << 20)
            await client.sleep(1)
            assert process.memory_info().rss < full - (4 << 20)

    run(test())


class TestOrder:
    def test_what_runs_ends_first_and_what_comes_wakes(self, endless_model: Path) -> None:
        async def test() -> None:
            async with running(config(endless_model)) as client:
                running_one = submit(client, "running", 300)
                await anext(running_one)
                asleep = asyncio.create_task(client.sleep(1))
                await asyncio.sleep(0)
                late = [submit(client, f"late{number}", 5) for number in range(20)]
                assert len(await tokens_of(running_one)) >= 290
                await asleep
                assert [len(await tokens_of(stream)) for stream in late] == [5] * 20
                assert (client.state, client.sleeps, client.wakes) == ("warm", 1, 1)

        run(test())

    def test_dozing_off_gives_way_to_a_request(self, endless_model: Path) -> None:
        async def test() -> None:
            async with running(config(endless_model)) as client:
                await client.wait_ready()
                client.doze_off(1)
                assert len(await tokens_of(submit(client, "quick", 5))) == 5
                assert client.state == "warm"
                client.doze_off(1)
                await until(lambda: client.state == "asleep")
                assert client.sleeps == 1

        run(test())

    def test_deeper_and_awake_again(self, endless_model: Path) -> None:
        async def test() -> None:
            async with running(config(endless_model)) as client:
                await client.wait_ready()
                await client.sleep(1)
                await client.sleep(2)
                assert client.sleep_level == 2
                await client.sleep(1)
                assert client.sleep_level == 2
                await client.wake()
                await client.wake()
                assert (client.state, client.wakes) == ("warm", 1)

        run(test())

    def test_a_request_that_is_left_while_it_waits_is_forgotten(self, endless_model: Path) -> None:
        async def test() -> None:
            async with running(config(endless_model)) as client:
                first = submit(client, "first", 200)
                await anext(first)
                asleep = asyncio.create_task(client.sleep(1))
                await asyncio.sleep(0)
                submit(client, "left", 5).close()
                await tokens_of(first)
                await asleep
                await asyncio.sleep(0.2)
                assert (client.state, client.wakes) == ("asleep", 0)

        run(test())


class TestEnds:
    def test_killed_in_its_sleep_it_starts_with_the_next_request(self, tiny_model: Path) -> None:
        async def test() -> None:
            async with running(config(tiny_model)) as client:
                before = await tokens_of(submit(client, "before", 20))
                await client.sleep(1)
                assert client.pid is not None
                os.kill(client.pid, signal.SIGKILL)
                await until(lambda: client.state == "cold")
                assert client.pid is None
                assert await tokens_of(submit(client, "after", 20)) == before
                assert (client.state, client.restarts, client.wakes) == ("warm", 1, 0)

        run(test())

    def test_told_to_leave_it_starts_with_the_next_request(self, tiny_model: Path) -> None:
        async def test() -> None:
            async with running(config(tiny_model)) as client:
                before = await tokens_of(submit(client, "before", 20))
                await client.sleep(1)
                assert client.pid is not None
                process = psutil.Process(client.pid)
                client.leave()
                after = submit(client, "after", 20)
                assert await tokens_of(after) == before
                assert not process.is_running()
                assert (client.state, client.restarts) == ("warm", 0)

        run(test())

    def test_not_started_before_it_is_called(self, tiny_model: Path) -> None:
        async def test() -> None:
            client = EngineClient(config(tiny_model))
            life = asyncio.create_task(client.run(at_once=False))
            await client.sleep(1)
            await asyncio.sleep(0.1)
            assert (client.state, client.pid) == ("cold", None)
            assert len(await tokens_of(submit(client, "first", 5))) == 5
            client.leave()
            await client.close(drain_seconds=5)
            await asyncio.wait_for(life, 20)

        run(test())

    def test_draining_wakes_nobody(self, tiny_model: Path) -> None:
        async def test() -> None:
            client = EngineClient(config(tiny_model))
            life = asyncio.create_task(client.run())
            await client.wait_ready()
            await client.sleep(2)
            await client.close(drain_seconds=20)
            await asyncio.wait_for(life, 20)
            assert client.wakes == 0

        run(test())

    def test_weights_that_changed_meanwhile_are_noticed(
        self, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Without an answer from them: they are loaded as the new model that they are."""
        directory = shutil.copytree(tiny_model, tmp_path / "model")
        file = directory / "model.safetensors"

        async def test() -> None:
            async with running(config(directory)) as client:
                await tokens_of(submit(client, "before", 20))
                await client.sleep(2)
                tensors = load_file(file)
                tensors["model.norm.weight"] = tensors["model.norm.weight"] * 0.5
                changed = tmp_path / "changed.safetensors"
                save_file(tensors, changed, {"format": "pt"})
                file.write_bytes(changed.read_bytes())  # in place, under the engine's feet
                with pytest.raises(EngineUnavailable, match="did not say what it said"):
                    await tokens_of(submit(client, "during", 20))
                await client.wait_ready()
                assert await tokens_of(submit(client, "after", 20))
                assert client.restarts == 1

        run(test())
        assert "Traceback" not in capfd.readouterr().err
