"""A rehearsal needs nothing but shapes, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import torch

from runtime.engine.rehearsal import rehearse
from runtime.model.families import Model, read_model
from runtime.protocol import EngineConfig
from runtime.weights.checkpoint import read_checkpoint
from runtime.weights.loader import MappedWeights
from runtime.weights.plan import make_plan
from tests.runtime.sources.models import spec


def test_a_step_is_taken_with_weights_that_are_not_there(tiny_model: Path) -> None:
    model = read_model(tiny_model)
    assert isinstance(model, Model)
    weights = MappedWeights(make_plan(model, read_checkpoint(tiny_model))).tensors()
    for tensors in weights.values():
        for tensor in tensors:
            tensor.fill_(torch.nan)  # a private mapping: the file keeps its values
    config = EngineConfig(model=spec(str(tiny_model)), cache_dir="", device="cpu")
    rehearse(config, tiny_model, model, weights, "cpu")
    assert all(tensor.isnan().all() for tensors in weights.values() for tensor in tensors)
