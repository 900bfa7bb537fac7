"""The checkpoint that a config.json implies is the one that its model was saved as."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.model.families import read_model
from runtime.weights.checkpoint import read_checkpoint
from runtime.weights.imagined import imagined_checkpoint
from runtime.weights.plan import make_plan
from tests.runtime.model.checkpoints import CASES, of_transformers
from tests.runtime.model.references.packing import quantise
from tests.runtime.model.test_quantization import FORMATS, SIZES


def check(directory: Path) -> None:
    """What the plan of the files themselves reads is what is imagined."""
    model, real = read_model(directory), read_checkpoint(directory)
    read = {piece.tensor.name for each in make_plan(model, real).parameters for piece in each.pieces}
    found = imagined_checkpoint(model)
    # Scales of blocks go by another name in some files.
    renamed = {name.replace("weight_scale_inv", "weight_scale"): real[name] for name in read}
    assert {name: each.shape for name, each in found.items()} == {n: t.shape for n, t in renamed.items()}
    for name, each in found.items():
        assert each.item_bytes == renamed[name].item_bytes or name.endswith((".scales", "weight_scale"))
        assert (each.dtype in ("I32", "F8_E4M3")) == (renamed[name].dtype in ("I32", "F8_E4M3"))


@pytest.mark.parametrize("name", ["Qwen", "Baichuan 13B", "InternLM2", "ChatGLM3", "Gemma 2"])
def test_of_families(name: str, tmp_path: Path) -> None:
    CASES[name](tmp_path)
    check(tmp_path)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("FP8", "GPTQ Int4, the head too")])
def test_of_quantised_models(name: str, tmp_path: Path) -> None:
    of_transformers("Qwen2", tmp_path, **SIZES)
    quantise(tmp_path, FORMATS[name])
    check(tmp_path)
