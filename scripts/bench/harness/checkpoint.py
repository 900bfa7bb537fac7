"""What the benchmarks need to know of a checkpoint, from its safetensors headers alone."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import BenchError

_HASHED_BYTES = 1 << 16
_EMBEDDING = "embed_tokens.weight"


def config_of(folder: Path) -> dict[str, Any]:
    """config.json. Raises BenchError if there is none."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config
    except OSError as error:
        raise BenchError(f"{folder} is not a model's folder: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files. Raises BenchError if there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BenchError(f"there is no safetensors file in {folder}")
    return files


def weight_bytes(folder: Path) -> int:
    """The size of the files with the weights."""
    return sum(file.stat().st_size for file in weight_files(folder))


def layer_parameters(folder: Path) -> int:
    """How many weights a token of a prompt is multiplied with: all matrices but embedding and head."""
    bits = config_of(folder).get("quantization_config", {}).get("bits", 32)
    total = 0
    for name, tensor in _tensors(folder):
        shape = tensor["shape"]
        if name.endswith(".qweight"):
            total += shape[0] * shape[1] * 32 // bits  # GPTQ packs several weights into one int32
        elif name.endswith(".weight") and len(shape) == 2 and not _at_the_ends(name):
            total += shape[0] * shape[1]
    return total


def embedding_bytes(folder: Path) -> int:
    """The size of the token embedding."""
    for name, tensor in _tensors(folder):
        if name.endswith(_EMBEDDING):
            begin, end = tensor["data_offsets"]
            return int(end - begin)
    raise BenchError(f"there is no {_EMBEDDING} in {folder}")


def _at_the_ends(name: str) -> bool:
    return name.endswith(_EMBEDDING) or name.startswith("lm_head")


def _tensors(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in weight_files(folder):
        yield from _header(file)[0].items()


def fingerprint(folder: Path) -> str:
    """Tells one model's weights from another's, from its size and the beginning of its embedding."""
    config = config_of(folder)
    digest = hashlib.sha256()
    for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
        digest.update(f"{key}={config.get(key)};".encode())
    for file in weight_files(folder):
        tensors, data_start = _header(file)
        for name in sorted(tensors):
            if name.endswith(_EMBEDDING):
                with open(file, "rb") as data:
                    data.seek(data_start + tensors[name]["data_offsets"][0])
                    digest.update(tensors[name]["dtype"].encode() + data.read(_HASHED_BYTES))
    return digest.hexdigest()


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The tensors of a safetensors file and where its data begins."""
    with open(file, "rb") as data:
        (length,) = struct.unpack("<Q", data.read(8))
        tensors: dict[str, Any] = json.loads(data.read(length))
    tensors.pop("__metadata__", None)
    return tensors, 8 + length
