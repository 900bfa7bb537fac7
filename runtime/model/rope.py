"""The table of rotary angles, with the ways in which checkpoints stretch it to longer contexts."""

from __future__ import annotations

import math

import torch

from runtime.model.config import RopeConfig


def cos_sin_table(rope: RopeConfig, length: int) -> torch.Tensor:
    """[length, 2, rotary_dim / 2] float32: cosines and sines of every position's angles."""
    angles = torch.arange(length, dtype=torch.float32)[:, None] * inverse_frequencies(rope)[None]
    return torch.stack((angles.cos(), angles.sin()), dim=1).contiguous()


def inverse_frequencies(rope: RopeConfig) -> torch.Tensor:
    """[rotary_dim / 2] float32: how far each pair of dimensions turns per position, in radians."""
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    plain = 1.0 / rope.theta**exponents
    if rope.scaling is None:
        return plain
    factor = float(rope.scaling["factor"])
    kind = rope.scaling.get("rope_type") or rope.scaling.get("type")
    if kind == "linear":
        return plain / factor
    return _llama3(plain, factor, rope.scaling)


def _llama3(plain: torch.Tensor, factor: float, scaling: dict[str, float]) -> torch.Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones stay, those between blend.

    Source: the `llama3` entry of transformers' rope utilities, which follows Meta's release.
    """
    trained = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = trained * plain / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * plain / factor + blend * plain
