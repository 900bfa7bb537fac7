"""Sleep on a GPU: the memory goes, the addresses stay, and graphs go on where they left off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from runtime.catalogue import ModelSpec
from runtime.engine.canary import CanaryError
from runtime.engine.core import Engine
from runtime.engine.sleeper import PARTS, Sleeper
from runtime.engine.start import start
from runtime.kernels.adopted import adopted
from runtime.protocol import Asleep, Awake, EngineConfig, Event, Sleep, SleepLevel, Wake
from runtime.weights.cuda_driver import Driver
from runtime.weights.virtual_memory import VirtualMemory
from tests.gpu.test_engine import NAMED, SHAPE, answers
from tests.runtime.engine.test_against_transformers import differences, save_random_llama
from tests.runtime.test_client import config, running, submit, tokens_of
from tests.runtime.test_client import run as run_client

pytestmark = pytest.mark.gpu


def make(directory: Path, events: list[Event], **settings: Any) -> tuple[Engine, Sleeper]:
    spec = ModelSpec(id="tiny", source=str(directory))
    chosen = {"device": "cuda", "kv_cache_bytes": 512 << 20, "max_num_seqs": 16} | settings
    config = EngineConfig(model=spec, cache_dir=str(directory), **chosen)
    engine, _, sleeper, _ = start(config, events.append)
    return engine, sleeper


def fall_asleep(sleeper: Sleeper, level: SleepLevel) -> None:
    sleeper.take(Sleep(level))
    for _ in range(PARTS):
        assert not sleeper.is_asleep
        sleeper.advance()
    assert sleeper.is_asleep


def wake(sleeper: Sleeper) -> None:
    sleeper.take(Wake())
    assert not sleeper.is_asleep
    sleeper.finish_waking()


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_memory_comes_back_at_the_same_address_for_a_graph_that_holds_it() -> None:
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    driver = Driver()
    memory = VirtualMemory(driver, 100 << 20)

    tensor = adopted(memory.address, memory.num_bytes)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = tensor[: 1 << 20].sum(dtype=torch.int64)
    before = used_bytes()
    memory.give_back()
    assert before - used_bytes() == memory.num_bytes
    memory.take()
    tensor.fill_(3)
    graph.replay()
    torch.cuda.synchronize()
    assert total.item() == 3 << 20
    memory.close()


@pytest.mark.parametrize("levels", [[1, 1, 1], [2, 2], [1, 2, 1]], ids=str)
def test_answers_are_the_references_after_every_sleep(levels: list[SleepLevel], tmp_path: Path) -> None:
    model = save_random_llama(tmp_path, torch.float32, **SHAPE)
    events: list[Event] = []
    engine, sleeper = make(tmp_path, events)
    assert differences(model, NAMED, answers(engine, NAMED)) == {}
    while engine.runner.use_idle_time():
        pass
    assert differences(model, NAMED, answers(engine, NAMED)) == {}
    for level in levels:
        fall_asleep(sleeper, level)
        wake(sleeper)
        cached = engine.stats.cached_tokens_total
        one = {"r1": NAMED["r1"]}
        assert differences(model, one, answers(engine, one)) == {}
        assert engine.stats.cached_tokens_total == cached
        assert differences(model, NAMED, answers(engine, NAMED)) == {}
    slept = [event.level for event in events if isinstance(event, Asleep)]
    assert slept == levels
    assert sum(isinstance(event, Awake) for event in events) == len(levels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_was_made_of_weights_wakes_too(dtype: torch.dtype, tmp_path: Path) -> None:
    """Biases, norms in float32, tables of angles, and here all weights, which become bfloat16."""
    save_random_llama(tmp_path, dtype, **SHAPE, attention_bias=True, mlp_bias=True)
    engine, sleeper = make(tmp_path, [], dtype="bfloat16")
    before = answers(engine, NAMED)
    for level in (1, 2):
        fall_asleep(sleeper, level)
        wake(sleeper)
        assert answers(engine, NAMED) == before


def test_the_cache_and_the_weights_leave_the_device(tmp_path: Path) -> None:
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "max_position_embeddings": 1 << 16}
    save_random_llama(tmp_path, torch.bfloat16, **SHAPE | wide)
    weights = (tmp_path / "model.safetensors").stat().st_size
    engine, sleeper = make(tmp_path, [])
    answers(engine, NAMED)
    before = used_bytes()
    fall_asleep(sleeper, 1)
    assert before - used_bytes() >= weights + (500 << 20)


def test_a_damaged_copy_is_noticed(tmp_path: Path) -> None:
    save_random_llama(tmp_path, torch.bfloat16, **SHAPE)
    _, sleeper = make(tmp_path, [])
    fall_asleep(sleeper, 2)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-40_000:] = bytes(40_000)
    file.write_bytes(content)
    with pytest.raises(CanaryError, match="did not say what it said"):
        wake(sleeper)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
def test_ranks_sleep_together(tmp_path: Path) -> None:
    save_random_llama(tmp_path, torch.bfloat16, **SHAPE)

    async def test() -> None:
        async with running(config(tmp_path, device="cuda", world_size=2)) as client:
            before = await tokens_of(submit(client, "before", 20))
            for level in (1, 2):
                await client.sleep(level)  # type: ignore[arg-type]
                assert await tokens_of(submit(client, f"after{level}", 20)) == before
            assert (client.state, client.wakes, client.restarts) == ("warm", 2, 0)

    run_client(test())
