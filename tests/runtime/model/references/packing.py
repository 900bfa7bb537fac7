"""Quantised checkpoints written word by word from the formats' descriptions, and what they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

# The outputs that AWQ puts in a word's fields, from the lowest bits on.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _words(values: np.ndarray, bits: int, order: tuple[int, ...]) -> np.ndarray:
    """[R, C] -> [R, C / n]: of each run of n neighbours, number order[i] in field i."""
    runs = values.reshape(values.shape[0], -1, len(order)).astype(np.uint32)
    words = np.zeros(runs.shape[:2], np.uint32)
    for field, column in enumerate(order):
        words |= runs[:, :, column] << np.uint32(bits * field)
    return words.view(np.int32)


def quantised(name: str, shape: tuple[int, int], settings: dict[str, Any], random: np.random.Generator):
    """Random tensors of one layer [N, K] under their names, and the weight in float16 that they mean."""
    outputs, inputs = shape
    bits, largest = settings["bits"], 2 ** settings["bits"] - 1
    group = inputs if settings["group_size"] == -1 else settings["group_size"]
    groups = np.arange(inputs) // group
    if settings.get("desc_act"):
        groups = random.permutation(groups)
    count = groups.max() + 1
    values = random.integers(0, largest + 1, (inputs, outputs))
    zeros = np.full((count, outputs), (largest + 1) // 2)
    if not settings.get("sym"):
        zeros = random.integers(1, largest + 1, (count, outputs))
    scales = (random.random((count, outputs)) + 0.5).astype(np.float16) * np.float16(0.6 / largest)
    weight = ((values - zeros[groups]) * scales.astype(np.float64)[groups]).T.astype(np.float16)
    straight = tuple(range(32 // bits))
    if settings["quant_method"] == "awq":
        packed = {"qweight": _words(values, bits, AWQ_ORDER), "qzeros": _words(zeros, bits, AWQ_ORDER)}
    else:
        stored = zeros if settings.get("checkpoint_format") == "gptq_v2" else zeros - 1
        packed = {
            "qweight": np.ascontiguousarray(_words(values.T, bits, straight).T),
            "qzeros": _words(stored, bits, straight),
            "g_idx": groups.astype(np.int32),
        }
    packed["scales"] = scales
    base = name.removesuffix(".weight")
    tensors = {f"{base}.{kind}": torch.from_numpy(np.ascontiguousarray(t)) for kind, t in packed.items()}
    return tensors, torch.from_numpy(weight)


def _e4m3(codes: np.ndarray) -> np.ndarray:
    """What bytes of the e4m3 type mean: a sign, 4 bits of exponent less 7, 3 bits of mantissa."""
    exponent, mantissa = (codes >> 3 & 15).astype(np.float64), (codes & 7).astype(np.float64)
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.where(codes & 128, -size, size)


def quantised_fp8(name: str, shape: tuple[int, int], settings: dict[str, Any], random: np.random.Generator):
    """As `quantised`, in e4m3 with a scale for all, for each output or for each block; meant in float32."""
    codes = random.integers(0, 256, shape).astype(np.uint8)
    codes[codes & 127 == 127] = 0  # there is no such number
    rows, columns = settings.get("weight_block_size", shape)
    kind, scale_shape = "weight_scale", (-(-shape[0] // rows), -(-shape[1] // columns))
    if "weight_block_size" in settings:
        kind = "weight_scale_inv"
    elif settings["quant_method"] == "compressed-tensors":
        rows, scale_shape = 1, (shape[0], 1)
    # The largest of these numbers is 448.
    scales = ((random.random(scale_shape) + 0.5) * (0.3 / 100)).astype(np.float32)
    spread = scales.repeat(rows, 0)[: shape[0]].repeat(columns, 1)[:, : shape[1]]
    weight = torch.from_numpy((_e4m3(codes) * spread).astype(np.float32))
    if settings["quant_method"] == "fp8" and kind == "weight_scale":
        scales = scales.reshape(())
    base = name.removesuffix(".weight")
    tensors = {
        f"{base}.weight": torch.from_numpy(codes).view(torch.float8_e4m3fn),
        f"{base}.{kind}": torch.from_numpy(scales),
    }
    return tensors, weight


def quantise(directory: Path, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Replace the linear layers of a checkpoint by random quantised ones; returns the weights they mean."""
    random = np.random.default_rng(4)
    tensors = load_file(directory / "model.safetensors")
    meant = {}
    for name, tensor in list(tensors.items()):
        quantised_here = ".layers." in name or ".h." in name
        quantised_here |= settings.get("lm_head", False) and name == "lm_head.weight"
        if quantised_here and name.endswith(".weight") and tensor.ndim == 2:
            method = quantised if settings["quant_method"] in ("gptq", "awq") else quantised_fp8
            packed, meant[name] = method(name, tuple(tensor.shape), settings, random)
            del tensors[name]
            tensors |= packed
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    return meant
