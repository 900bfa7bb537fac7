"""The shapes of the catalogue's models, and what the catalogue says that they take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import ROOT
from harness.device_model import config_of, plan_of, step_bytes
from harness.shapes import SHAPES

from runtime.catalogue import load_catalogue
from runtime.model.families import read_model

MODELS = load_catalogue(ROOT / "models.yaml").models


def test_every_model_of_the_catalogue_has_a_shape() -> None:
    assert set(MODELS) - set(SHAPES) == {"HuggingFaceTB/SmolLM2-135M-Instruct"}


@pytest.mark.parametrize("name", SHAPES)
def test_the_catalogue_says_what_a_model_takes(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(name)))
    model = read_model(tmp_path)
    plan, config, memory = plan_of(model), model.config, MODELS[name].memory
    assert plan.read_bytes / 1e9 == pytest.approx(memory["weights_gb"], abs=0.1)
    width = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    assert 2 * width / 1024 == memory["kv_kib_per_token"]
    assert MODELS[name].max_model_len <= config.max_position_embeddings
    assert 0.7 * plan.read_bytes < step_bytes(model, plan) <= plan.read_bytes


def test_published_sizes() -> None:
    # What the Hub says of the files of these.
    published = {
        "meta-llama/Meta-Llama-3-8B-Instruct": 16.06,
        "google/gemma-2-27b-it": 54.45,
        "mistralai/Mistral-7B-Instruct-v0.3": 14.5,
        "THUDM/chatglm3-6b": 12.49,
    }
    for name, size in published.items():
        assert MODELS[name].memory["weights_gb"] == pytest.approx(size, abs=0.06)
