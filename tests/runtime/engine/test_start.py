"""What the engine refuses before it fetches or loads anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.catalogue import ModelSpec
from runtime.engine.start import start
from runtime.errors import FirstlightError
from runtime.protocol import EngineConfig, Event


def test_more_devices_than_one_are_refused_before_a_download(tmp_path: Path) -> None:
    events: list[Event] = []
    spec = ModelSpec(id="large", source="hf://org/large")
    config = EngineConfig(model=spec, cache_dir=str(tmp_path), device="cpu", world_size=4)
    with pytest.raises(
        FirstlightError, match="--tensor-parallel-size 4: this version computes on one device"
    ):
        start(config, events.append)
    assert events == []
    assert list(tmp_path.iterdir()) == []
