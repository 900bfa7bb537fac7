"""GPTQ and AWQ checkpoints answer as the models whose weights they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.errors import FirstlightError
from runtime.kernels.dequantize import dequantize_all
from runtime.model.families import read_model
from runtime.weights.checkpoint import read_checkpoint
from runtime.weights.loader import MappedWeights
from runtime.weights.plan import make_plan
from tests.runtime.engine.test_against_transformers import make_engine
from tests.runtime.model.checkpoints import CASES, of_transformers
from tests.runtime.model.references.packing import quantise
from tests.runtime.model.test_families import PROMPTS, answers_of, check
from tests.runtime.model.test_layout import QKV, _arena

SIZES = {"hidden_size": 96, "intermediate_size": 128}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ: dict[str, Any] = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
}
FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
}
FORMATS: dict[str, dict[str, Any]] = {
    "GPTQ Int8": GPTQ | {"bits": 8},
    "GPTQ Int4": GPTQ,
    "GPTQ Int4, one group": GPTQ | {"group_size": -1},
    "GPTQ Int4, groups that are not whole": GPTQ | {"group_size": 40},
    "GPTQ Int4 with zero points": GPTQ | {"sym": False},
    "GPTQ v2 with zero points": GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"},
    "GPTQ Int8 with zero points": GPTQ | {"bits": 8, "sym": False},
    "GPTQ in the order of activations": GPTQ | {"desc_act": True},
    "GPTQ Int4, the head too": GPTQ | {"lm_head": True},
    "AWQ": AWQ,
    "FP8": FP8,
    "FP8 in blocks": FP8 | {"weight_block_size": [32, 32]},
    "FP8, a scale for each output": COMPRESSED,
}


@pytest.mark.parametrize("name", FORMATS)
def test_answers_are_those_of_the_weights_that_are_meant(name: str, tmp_path: Path) -> None:
    import transformers

    of_transformers("Qwen2", tmp_path, **SIZES)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for weight_name, weight in quantise(tmp_path, FORMATS[name]).items():
        # On a CPU, e4m3 becomes bfloat16.
        model.get_parameter(weight_name).data.copy_(weight.bfloat16() if "FP8" in name else weight)

    def reference(tokens: list[int], num_prompt: int) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([tokens]), use_cache=False).logits[0]

    answers = answers_of(make_engine(tmp_path), *PROMPTS)
    assert answers[0].keys() == PROMPTS.keys()
    check(reference, answers)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "name", ["GPTQ Int8", "GPTQ in the order of activations", "GPTQ Int4, one group", "AWQ"]
)
@pytest.mark.parametrize("family", ["Baichuan 13B", "InternLM2"])
def test_every_rank_has_its_share_of_packed_projections(
    family: str, name: str, world_size: int, tmp_path: Path
) -> None:
    CASES[family](tmp_path)
    settings = FORMATS[name]
    # Groups that divide among two ranks in every layer.
    meant = quantise(tmp_path, settings | ({} if settings["group_size"] == -1 else {"group_size": 8}))
    tensor, come_apart, _ = QKV[family]
    interleaved = family == "InternLM2" and "order" in name
    for rank in range(world_size):
        if interleaved:
            with pytest.raises(FirstlightError, match="desc_act is not supported for tensors packed like"):
                make_plan(read_model(tmp_path), read_checkpoint(tmp_path), rank, world_size)
            continue
        plan = make_plan(read_model(tmp_path), read_checkpoint(tmp_path), rank, world_size)
        held = MappedWeights(plan).tensors()
        found = dequantize_all(held, read_model(tmp_path).config.quantization)
        (qkv,), (o,) = found["layers.1.qkv"], found["layers.1.o"]
        assert torch.equal(
            qkv, torch.cat([part.chunk(world_size)[rank] for part in come_apart(meant[tensor])])
        )
        output = next(key for key in meant if ".1." in key and key.endswith(("o_proj.weight", "wo.weight")))
        assert torch.equal(o, meant[output].chunk(world_size, dim=1)[rank])
        words = b"".join(piece.contiguous().numpy().tobytes() for piece in held["layers.1.qkv.qweight"])
        assert _arena(plan, "layers.1.qkv.qweight") == words


def test_a_config_beside_config_json_says_it_as_well(tmp_path: Path) -> None:
    of_transformers("Qwen2", tmp_path, **SIZES)
    quantise(tmp_path, GPTQ)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    (tmp_path / "quantize_config.json").write_text(
        json.dumps({"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "damp_percent": 0.01})
    )
    found = read_model(tmp_path)
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    assert read_model(tmp_path) == found


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (GPTQ | {"bits": 3}, "quantization_config: gptq with bits 3 is not supported (4 or 8)"),
        (AWQ | {"bits": 8}, "quantization_config: awq with bits 8 is not supported (4)"),
        (AWQ | {"version": "gemv"}, "quantization_config: version 'gemv' is not supported"),
        (GPTQ | {"group_size": 0}, "quantization_config: group_size must be a positive integer, or -1"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
        (GPTQ | {"quant_method": "aqlm"}, "quant_method 'aqlm' is not supported (gptq, awq, fp8"),
        (GPTQ | {"group_size": 64}, "has shape [3, 12]; config.json implies [2, 12]"),
        (None, "is quantised, but config.json has no quantization_config"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_supported_or_does_not_fit(
    settings: dict[str, Any] | None, says: str, tmp_path: Path
) -> None:
    of_transformers("Qwen2", tmp_path, **SIZES)
    quantise(tmp_path, GPTQ)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    with pytest.raises(FirstlightError) as caught:
        make_engine(tmp_path)
    assert says in str(caught.value)


@pytest.mark.parametrize("asked", ["gptq", "gptq_marlin", None, "awq"])
def test_the_flag_may_name_what_the_checkpoint_is(asked: str | None, tmp_path: Path) -> None:
    from runtime.catalogue import ModelSpec
    from runtime.engine.start import start
    from runtime.protocol import EngineConfig

    of_transformers("Qwen2", tmp_path, **SIZES)
    quantise(tmp_path, GPTQ)
    spec = ModelSpec(id="tiny", source=str(tmp_path))
    config = EngineConfig.of(spec, str(tmp_path), device="cpu", kv_cache_bytes=8 << 20, quantization=asked)
    if asked == "awq":
        with pytest.raises(FirstlightError, match="--quantization awq does not fit this checkpoint"):
            start(config, lambda event: None)
    else:
        start(config, lambda event: None)


def test_groups_that_would_be_cut_in_two_are_refused(tmp_path: Path) -> None:
    of_transformers("Qwen2", tmp_path, **SIZES)
    quantise(tmp_path, GPTQ)
    with pytest.raises(
        FirstlightError, match=r"2 does not fit .* weights in groups of 32\). These .*: \[1\]"
    ):
        make_plan(read_model(tmp_path), read_checkpoint(tmp_path), 0, 2)
