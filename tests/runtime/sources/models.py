"""The files of a model as repositories hold them, and catalogue entries for the tests of the sources."""

from __future__ import annotations

import json
import random
from pathlib import Path

from runtime.catalogue import ModelSpec


def model_files(weight_bytes: int = 300_000, *, seed: int = 0, shards: int = 1) -> dict[str, bytes]:
    """A model's folder, with what a repository holds besides; the weights are random bytes."""
    rng = random.Random(seed)
    files = {
        "config.json": json.dumps({"model_type": "llama", "seed": seed}).encode(),
        "generation_config.json": b"{}",
        "tokenizer.json": b'{"model": {}}',
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "README.md": b"# A model",
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": b"the same once more",
        "original/params.json": b"{}",
        "onnx/model.onnx": b"onnx",
        "model-q4.gguf": b"GGUF",
    }
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    if shards == 1:
        names = ["model.safetensors"]
    else:
        weight_map = {f"layers.{i}.weight": name for i, name in enumerate(names)}
        files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    for name in names:
        files[name] = rng.randbytes(weight_bytes)
    return files


# What of `model_files` a runtime needs.
NEEDED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
}


def contents(directory: Path) -> dict[str, bytes]:
    """The visible files of a folder and what is in them."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if not path.name.startswith(".")}


def spec(source: str, revision: str | None = None) -> ModelSpec:
    """A catalogue entry of this source."""
    return ModelSpec(id="model", source=source, revision=revision)
