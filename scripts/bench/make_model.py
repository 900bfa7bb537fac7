"""Writes a checkpoint of random weights with a real model's shapes, for measuring speed.

    python scripts/bench/make_model.py llama-3-8b FOLDER [--layers N]

A folder as on the Hub: config, sharded bf16 safetensors, and a tokenizer as large as the real one. Its
answers mean nothing, but they are the same everywhere: `scripts/bench/reference.py` records them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from harness import BenchError, random_tokenizer
from harness.random_weights import Shapes, write_checkpoint
from harness.report import progress, run
from harness.shapes import LLAMA_3, QWEN_2

SHARD_BYTES = 4 << 30


def _sized(base: dict[str, Any], hidden: int, inner: int, layers: int, heads: int, kv: int) -> dict[str, Any]:
    return {
        **base,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": _sized(LLAMA_3, 4096, 14336, 32, 32, 8),
    "llama-3-70b": _sized(LLAMA_3, 8192, 28672, 80, 64, 8),
    "qwen2.5-7b": _sized(QWEN_2, 3584, 18944, 28, 28, 4),
    "qwen2.5-32b": _sized(QWEN_2, 5120, 27648, 64, 40, 8),
    "qwen2.5-72b": _sized(QWEN_2, 8192, 29568, 80, 64, 8),
    "small": _sized(LLAMA_3 | {"vocab_size": 4096}, 256, 512, 2, 4, 2) | {"head_dim": 64},
}


def tensor_shapes(config: dict[str, Any]) -> list[Shapes]:
    """Name and shape of every tensor: what stands before and after the layers, then layer by layer."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    groups: list[dict[str, tuple[int, ...]]] = [
        {
            "model.embed_tokens.weight": (vocab, hidden),
            "lm_head.weight": (vocab, hidden),
            "model.norm.weight": (hidden,),
        }
    ]
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config["model_type"] == "qwen2":
        widths = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        layer |= {f"self_attn.{name}.bias": (width,) for name, width in widths.items()}
    groups.extend(
        {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
        for number in range(config["num_hidden_layers"])
    )
    return list(groups)


def shards(groups: list[Shapes]) -> list[Shapes]:
    """Groups put together to files of at most 4 GiB, unless one group alone is larger."""
    files: list[dict[str, tuple[int, ...]]] = []
    left = 0
    for group in groups:
        size = sum(2 * _product(shape) for shape in group.values())
        if size > left:
            files.append({})
            left = SHARD_BYTES
        files[-1].update(group)
        left -= size
    return list(files)


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


def make(name: str, folder: Path, layers: int | None) -> int:
    """Write the whole folder; returns the bytes of its tensors. Raises BenchError if there is no room."""
    config = dict(SHAPES[name])
    if layers is not None:
        config["num_hidden_layers"] = layers
    groups = tensor_shapes(config)
    needed = sum(2 * _product(shape) for group in groups for shape in group.values())
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise BenchError(f"{folder} is not empty")
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BenchError(f"{folder} has {free / 1e9:.1f} GB of room, but {needed / 1e9:.1f} GB are needed")
    begin, end = random_tokenizer.write(folder, config["vocab_size"])
    ids = {"bos_token_id": begin, "eos_token_id": end}
    config |= {**ids, "torch_dtype": "bfloat16", "initializer_range": 0.02}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps(ids))
    return write_checkpoint(folder, shards(groups))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path, help="an empty or new one")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer than the real model has")
    options = parser.parse_args()
    began = time.perf_counter()
    size = make(options.name, options.folder, options.layers)
    progress(f"{size / 1e9:.2f} GB in {time.perf_counter() - began:.1f} s")
    print(options.folder)


if __name__ == "__main__":
    run(main)
