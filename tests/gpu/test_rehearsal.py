"""A rehearsal on a GPU: kernels are there afterwards, and the memory is free again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from runtime.engine.rehearsal import rehearse
from runtime.model.families import Model, read_model
from runtime.protocol import EngineConfig
from runtime.weights.checkpoint import read_checkpoint
from runtime.weights.loader import MappedWeights
from runtime.weights.plan import make_plan
from tests.runtime.engine.test_against_transformers import save_random_llama
from tests.runtime.sources.models import spec

pytestmark = pytest.mark.gpu
SHAPE: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 192}


def test_nothing_stays_but_what_was_loaded(tmp_path: Path) -> None:
    save_random_llama(tmp_path, torch.bfloat16, **SHAPE)
    model = read_model(tmp_path)
    assert isinstance(model, Model)
    mapped = MappedWeights(make_plan(model, read_checkpoint(tmp_path))).tensors()
    weights = {
        name: tuple(torch.full_like(t, torch.nan).cuda() for t in parts) for name, parts in mapped.items()
    }
    config = EngineConfig(model=spec(str(tmp_path)), cache_dir="", device="cuda")
    rehearse(config, tmp_path, model, weights, "cuda")
    before = torch.cuda.memory_allocated()
    rehearse(config, tmp_path, model, weights, "cuda")
    assert torch.cuda.memory_allocated() == before
