"""The checkpoint that a config.json implies: what its files' headers would say, where there are no files."""

from __future__ import annotations

import math
from pathlib import Path

from runtime.kernels.quantization import Quantization
from runtime.model.families import Model
from runtime.model.layout import Part
from runtime.model.quantization import spelled
from runtime.weights.checkpoint import ITEM_BYTES, TensorInfo

_DTYPES = {"float32": "F32", "float16": "F16"}
# What is quantised where anything is.
_PROJECTIONS = ("qkv", "o", "gate_up", "down")


def imagined_checkpoint(model: Model) -> dict[str, TensorInfo]:
    """Every tensor that the model's plan reads, by name; the bytes lie nowhere."""
    floats, quantization = _DTYPES.get(model.torch_dtype, "BF16"), model.config.quantization
    named: dict[str, TensorInfo] = {}
    for parameter in model.parameters:
        for part in parameter.parts:
            if quantization is not None and parameter.name.rpartition(".")[2] in _PROJECTIONS:
                named |= _quantised(part, quantization)
            else:
                named[part.tensor] = _info(part.tensor, floats, part.shape)
    stored = {"floats": floats, "int32": "I32", "e4m3": "F8_E4M3"}
    return {
        part.tensor: named.get(part.tensor) or _info(part.tensor, stored[part.holds], part.shape)
        for parameter in model.parameters
        for each in spelled(parameter, named, quantization)
        for part in each.parts
    }


def _quantised(part: Part, quantization: Quantization) -> dict[str, TensorInfo]:
    """The tensors by which a weight is known to be quantised."""
    base, (outputs, inputs) = part.tensor.removesuffix(".weight"), part.shape
    if quantization.method != "fp8":
        return {f"{base}.qweight": _info(f"{base}.qweight", "I32", _shape_of_words(part, quantization))}
    scales = -(-outputs // quantization.block_rows), 1
    if quantization.group_size != -1:
        scales = scales[0], -(-inputs // quantization.group_size)
    name = f"{base}.weight_scale"
    return {part.tensor: _info(part.tensor, "F8_E4M3", part.shape), name: _info(name, "F32", scales)}


def _shape_of_words(part: Part, quantization: Quantization) -> tuple[int, int]:
    (outputs, inputs), per_word = part.shape, 32 // quantization.bits
    return (inputs, outputs // per_word) if quantization.method == "awq" else (inputs // per_word, outputs)


def _info(name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name, dtype, shape, Path(), 0, ITEM_BYTES[dtype] * math.prod(shape))
