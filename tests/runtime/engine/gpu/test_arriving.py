"""What a step waits for while weights are on their way: for what it uses next, and not for what comes later.

That its answers are right is tested on a GPU; here the driver only notes who waits for what.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from runtime.engine.gpu.arriving import Arriving
from runtime.model.families import read_model
from runtime.weights.checkpoint import read_checkpoint
from runtime.weights.cuda_driver import Driver
from runtime.weights.host_copy import Filled
from runtime.weights.plan import Plan, make_plan
from runtime.weights.upload import DeviceWeights
from tests.runtime.weights.conftest import write_model

ARENA = 1 << 20
STEP = ("embedding", "layers.0", "layers.1", "all")


class Waits:
    """A driver that notes which events streams are held for."""

    def __init__(self) -> None:
        self.events: list[int] = []

    def hold(self, stream: int, event: int) -> None:
        self.events.append(event)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    return Waits()


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    write_model(tmp_path, torch.float16)
    return make_plan(read_model(tmp_path), read_checkpoint(tmp_path))


def end_of(plan: Plan, prefix: str) -> int:
    found = [parameter for parameter in plan.parameters if parameter.name.startswith(prefix)]
    return max(one.offset + sum(piece.num_bytes for piece in one.pieces) for one in found)


def begun(waits: Waits, plan: Plan, ends: list[int]) -> Arriving:
    arriving = Arriving(cast(Driver, waits))
    weights: Any = SimpleNamespace(plan=plan, address=ARENA)
    filled = [Filled(ARENA + end, cast(Any, number)) for number, end in enumerate(ends)]
    arriving.begin(filled, cast(DeviceWeights, weights))
    return arriving


def test_each_layer_waits_until_all_of_it_has_come(plan: Plan, waits: Waits) -> None:
    layers = [end_of(plan, f"layers.{index}.") for index in range(2)]
    ends = [end_of(plan, "embedding") - 1, layers[0] - 1, layers[0], layers[1] + 1, plan.arena_bytes]
    arriving = begun(waits, plan, ends)
    for _ in range(2):
        for name in STEP:
            arriving.wait_for(name)
    # The embedding's last byte comes with the second event, and nothing is waited for twice.
    assert waits.events == [1, 2, 3, 4]


def test_what_has_no_place_in_the_plan_waits_for_everything(plan: Plan, waits: Waits) -> None:
    begun(waits, plan, [10, 20, plan.arena_bytes]).wait_for("all")
    assert waits.events == [2]


def test_where_nothing_comes_nothing_waits(waits: Waits) -> None:
    arriving = Arriving(cast(Driver, waits))
    arriving.begin([], None)
    for name in STEP:
        arriving.wait_for(name)
    assert waits.events == []
