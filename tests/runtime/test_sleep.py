"""Falling asleep and waking, seen through the client: what goes, what stays, who waits for whom."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file, save_file

from runtime.client import EngineClient, EngineUnavailable
from runtime.protocol import SamplingParams, Submit
from tests.runtime.test_client import config, run, running, submit, tokens_of, until


def test_levels(tiny_model: Path) -> None:
    """The same answers after each, with nothing left in the cache; and from one level to the other."""

    async def test() -> None:
        async with running(config(tiny_model)) as client:
            before = await tokens_of(submit(client, "before", 40))
            cached = 0
            for level in (1, 2):
                assert client.stats.cached_tokens_total == cached
                await client.sleep(level)  # type: ignore[arg-type]
                assert (client.state, client.sleep_level) == ("asleep", level)
                assert await tokens_of(submit(client, f"after{level}", 40)) == before
                assert (client.state, client.sleep_level, client.wakes) == ("warm", None, level)
                assert client.stats.cached_tokens_total == cached
                assert await tokens_of(submit(client, f"again{level}", 40)) == before
                assert client.stats.cached_tokens_total > cached
                cached = client.stats.cached_tokens_total
            await client.sleep(1)
            await client.sleep(2)
            assert client.sleep_level == 2
            await client.sleep(1)
            assert client.sleep_level == 2
            await client.wake()
            await client.wake()
            assert (client.state, client.wakes, client.restarts) == ("warm", 3, 0)

    run(test())


def test_memory_is_given_back(endless_model: Path) -> None:
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


def test_who_gives_way_to_whom(endless_model: Path) -> None:
    async def test() -> None:
        async with running(config(endless_model)) as client:
            first = submit(client, "first", 100)
            await anext(first)
            # One that sleeps because it is told to ends what it has begun, and takes nothing else up.
            asleep = asyncio.create_task(client.sleep(1))
            await asyncio.sleep(0)
            submit(client, "left", 5).close()
            await tokens_of(first)
            await asleep
            await asyncio.sleep(0.2)
            assert (client.state, client.wakes) == ("asleep", 0)
            # One that sleeps because nobody comes is up at once when somebody does.
            await client.wake()
            client.doze_off(1)
            assert len(await tokens_of(submit(client, "quick", 5))) == 5
            assert (client.state, client.sleeps) == ("warm", 1)
            client.doze_off(1)
            await until(lambda: client.state == "asleep")
            # Ending wakes nobody.
            await client.close(drain_seconds=20)
            assert client.wakes == 1

    run(test())


def test_it_is_started_when_it_is_called_and_anew_when_it_has_left(tiny_model: Path) -> None:
    async def test() -> None:
        client = EngineClient(config(tiny_model))
        life = asyncio.create_task(client.run(at_once=False))
        await client.sleep(1)
        await asyncio.sleep(0.1)
        assert (client.state, client.pid) == ("cold", None)
        first = await tokens_of(submit(client, "first", 20))
        assert client.pid is not None
        process = psutil.Process(client.pid)
        client.leave()
        assert client.state == "cold"
        assert await tokens_of(submit(client, "second", 20)) == first
        assert not process.is_running()
        assert (client.state, client.restarts) == ("warm", 0)
        client.leave()
        await client.close(drain_seconds=5)
        await asyncio.wait_for(life, 20)

    run(test())


def test_weights_that_changed_meanwhile_give_no_answer(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They are loaded as the new model that they are."""
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


def test_ranks_sleep_together(tiny_model: Path) -> None:
    async def test() -> None:
        async with running(config(tiny_model, world_size=2)) as client:
            before = await tokens_of(submit(client, "before", 20))
            for level in (1, 2):
                await client.sleep(level)  # type: ignore[arg-type]
                assert await tokens_of(submit(client, f"after{level}", 20)) == before
            assert (client.state, client.wakes, client.restarts) == ("warm", 2, 0)

    run(test())
