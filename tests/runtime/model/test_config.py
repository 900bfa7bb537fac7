"""A config.json that asks for what this runtime does not compute is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import FirstlightError
from runtime.model.families import read_model
from tests.runtime.model.checkpoints import CASES, SIZES

LLAMA = SIZES | {"architectures": ["LlamaForCausalLM"]}


def _changed(config: dict[str, Any], directory: Path, **changes: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported (silu, gelu_pytorch_tanh)"),
        ({"rope_scaling": {"type": "longrope"}}, "rope scaling of type 'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling must have factor, a number above zero"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8}},
            "rope_parameters must have low_freq_factor",
        ),
        ({"rope_parameters": {"rope_theta": "much"}}, "rope_theta and partial_rotary_factor must be numbers"),
        ({"rope_scaling": 4}, "rope_scaling must be an object or null, not 4"),
        ({"num_attention_heads": 5}, "5 heads cannot share 2 key/value heads"),
        ({"layer_types": ["sliding_attention"]}, "layer_types must say full_attention or sliding_attention"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types must say"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, not True"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_llama(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(FirstlightError) as caught:
        read_model(_changed(LLAMA, tmp_path, **changes))
    assert str(caught.value).startswith(f"{tmp_path}/config.json: ")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("Qwen", {"no_bias": False}, "no_bias False is not supported (true)"),
        ("Qwen", {"seq_length": None}, "seq_length must be a positive integer"),
        ("ChatGLM3", {"rmsnorm": False}, "rmsnorm False is not supported (true)"),
        ("ChatGLM3", {"seq_length": 0}, "seq_length must be a positive integer, not 0"),
        ("InternLM2", {"bias": True}, "bias True is not supported (false)"),
        ("Baichuan 13B", {"model_max_length": None}, "model_max_length must be a positive integer"),
    ],
)
def test_other_families(family: str, changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    CASES[family](tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    read_model(tmp_path)
    with pytest.raises(FirstlightError) as caught:
        read_model(_changed(config, tmp_path, **changes))
    assert f"{tmp_path}/config.json: {says}" in str(caught.value)


def test_qwen_72b_neither_slows_down_nor_grows(tmp_path: Path) -> None:
    CASES["Qwen"](tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    model = read_model(
        _changed(config, tmp_path, use_dynamic_ntk=False, use_logn_attn=False, seq_length=None)
    )
    assert model.config.rope is not None
    assert model.config.rope.ntk_length is None
    assert model.config.log_n_length is None


@pytest.mark.parametrize("spelling", ["before transformers 5", "since"])
def test_gemma_3_in_either_spelling(spelling: str, tmp_path: Path) -> None:
    """The Hub's files say how often a layer sees everything, newer ones say it of each layer."""
    import transformers

    old = {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 9,
        "sliding_window_pattern": 3,
    }
    theirs = transformers.Gemma3TextConfig(**(SIZES | {"num_hidden_layers": 5} | old))
    if spelling == "since":
        theirs.architectures = ["Gemma3ForCausalLM"]
        theirs.save_pretrained(tmp_path)
    else:
        _changed(SIZES, tmp_path, architectures=["Gemma3ForCausalLM"], num_hidden_layers=5, **old)
    config = read_model(tmp_path).config
    assert config.windows == tuple(9 if kind == "sliding_attention" else 0 for kind in theirs.layer_types)
    assert config.windows == (9, 9, 0, 9, 9)
    assert config.rope is not None
    assert config.local_rope is not None
    assert (config.rope.theta, config.local_rope.theta) == (1e6, 1e4)
    assert config.rope.scaling is not None
    assert config.rope.scaling["factor"] == 8.0
    assert config.local_rope.scaling is None
