"""A Llama with everything that is divided in its own way, in two shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.runtime.weights.safetensors_files import write_index

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, VOCAB, LAYERS = 8, 2, 4, 24, 40, 53, 2
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "attention_bias": True,
    "mlp_bias": True,
}
QUERIES, KEYS = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
LAYER_SHAPES = {
    "input_layernorm.weight": [HIDDEN],
    "post_attention_layernorm.weight": [HIDDEN],
    "self_attn.q_proj.weight": [QUERIES, HIDDEN],
    "self_attn.q_proj.bias": [QUERIES],
    "self_attn.k_proj.weight": [KEYS, HIDDEN],
    "self_attn.k_proj.bias": [KEYS],
    "self_attn.v_proj.weight": [KEYS, HIDDEN],
    "self_attn.v_proj.bias": [KEYS],
    "self_attn.o_proj.weight": [HIDDEN, QUERIES],
    "self_attn.o_proj.bias": [HIDDEN],
    "mlp.gate_proj.weight": [INNER, HIDDEN],
    "mlp.gate_proj.bias": [INNER],
    "mlp.up_proj.weight": [INNER, HIDDEN],
    "mlp.up_proj.bias": [INNER],
    "mlp.down_proj.weight": [HIDDEN, INNER],
    "mlp.down_proj.bias": [HIDDEN],
}
SHAPES = {
    "model.embed_tokens.weight": [VOCAB, HIDDEN],
    **{f"model.layers.{n}.{name}": shape for n in range(LAYERS) for name, shape in LAYER_SHAPES.items()},
    "model.norm.weight": [HIDDEN],
    "lm_head.weight": [VOCAB, HIDDEN],
}


def write_model(directory: Path, dtype: torch.dtype, seed: int = 0) -> None:
    """The model's folder: config, index and two shards."""
    random = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in SHAPES.items()}
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, directory / file)
    write_index(directory, {name: file for file, held in shards.items() for name in held})
    (directory / "config.json").write_text(json.dumps(CONFIG))


@pytest.fixture(scope="session", params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder, in each dtype that weights may have."""
    directory = tmp_path_factory.mktemp("llama")
    write_model(directory, request.param)
    return directory
