"""Quantised checkpoints on a GPU: the answers of the weights that they stand for, where those are sure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

import transformers

from runtime.kernels import packed_linear
from runtime.protocol import Event, Wake
from tests.gpu.test_sleep import fall_asleep, make
from tests.runtime.engine.test_against_transformers import differences, make_engine
from tests.runtime.model.checkpoints import of_transformers
from tests.runtime.model.references.packing import quantise
from tests.runtime.model.test_families import PROMPTS, answers_of
from tests.runtime.model.test_quantization import FORMATS, SIZES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", FORMATS)
def test_answers_are_those_of_the_weights_that_are_meant(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == "bfloat16":
        monkeypatch.setattr(packed_linear, "DEQUANTIZE_ROWS", 20)
    of_transformers("Qwen2", tmp_path, **SIZES)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    for weight_name, weight in quantise(tmp_path, FORMATS[name]).items():
        for each in (model, half):
            each.get_parameter(weight_name).data.copy_(weight)
    half.cuda().eval()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch_dtype": dtype}))

    engine = make_engine(tmp_path, device="cuda", kv_cache_bytes=8 << 20, max_num_batched_tokens=40)
    layer = engine.runner.decoder.layers[0]
    assert isinstance(layer.mlp.down, packed_linear.PackedLinear) == ("not whole" not in name)
    for names in (["beyond four times"], list(PROMPTS), list(PROMPTS)):
        told = answers_of(engine, *names)[0]
        assert told.keys() == set(names)
        for each, place in differences(model, {each: PROMPTS[each] for each in names}, told).items():
            tokens = torch.tensor([PROMPTS[each] + told[each][:place]])
            with torch.no_grad():
                row = model(tokens).logits[0, -1]
                # How far another computation of this width is off says how closely tokens can be told apart.
                noise = float((half(tokens.cuda()).logits[0, -1].float().cpu() - row).abs().max())
            margin = float(row.max() - row[told[each][place]])
            assert margin < 3 * noise, f"{each} leaves the reference at {place} by {margin}, noise {noise}"


@pytest.mark.parametrize("name", ["GPTQ Int8", "GPTQ Int4 with zero points", "AWQ", "FP8 in blocks"])
def test_asleep_and_awake_the_answers_are_the_same(name: str, tmp_path: Path) -> None:
    of_transformers("Qwen2", tmp_path, **SIZES)
    quantise(tmp_path, FORMATS[name])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch_dtype": "float16"}))
    events: list[Event] = []
    engine, sleeper = make(tmp_path, events)
    before = answers_of(engine, *PROMPTS)
    for level in (2, 1, 2):
        fall_asleep(sleeper, level)
        sleeper.take(Wake())
        assert answers_of(engine, *PROMPTS) == before
