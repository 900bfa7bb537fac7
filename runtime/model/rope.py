"""What a position means to the decoder, as tables: rotary angles, slopes of biases, factors of queries."""

from __future__ import annotations

import math
from typing import Any

import torch

from runtime.model.config import RopeConfig


def cos_sin_table(rope: RopeConfig, length: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """[n * length, 2, rotary_dim / 2] float32: cosines and sines of every position's angles.

    They are computed on the device, which for a GPU takes no time.

    Where angles depend on the prompt's length (Qwen's dynamic NTK), there is one table of `length` positions
    after the other: for no doubling of the length that the model was trained with, for one, and so on.
    """
    positions = torch.arange(length, dtype=torch.float32, device=device)[:, None]
    tables = []
    for doublings in range(rope.doublings(length) + 1):
        angles = positions * _inverse_frequencies(rope, doublings)[None].to(device)
        tables.append(torch.stack((angles.cos(), angles.sin()), dim=1))
    return torch.cat(tables) * _magnitude(rope)


def log_n_table(trained: int, length: int) -> torch.Tensor:
    """[length] float32, factors of queries: 1, and past `trained` tokens log(position + 1) / log(trained).

    Source: Su, "Scaling attention by log n" (2021), as Qwen's first release has it.
    """
    count = torch.arange(1, length + 1, dtype=torch.float64)
    return (count.log() / math.log(trained)).clamp(min=1.0).float()


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """[num_heads] float32: how fast each head's scores fall with the distance.

    Press et al., "Train Short, Test Long" (2021), with its authors' rule for numbers of heads that are not
    powers of two: the missing ones take every other slope of twice as many heads.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * head / power) for head in range(1, power + 1)]
    between = [2.0 ** (-4.0 * head / power) for head in range(1, 2 * power, 2)]
    return torch.tensor((slopes + between)[:num_heads])


def _inverse_frequencies(rope: RopeConfig, doublings: int) -> torch.Tensor:
    """[rotary_dim / 2] float32: how far each pair of dimensions turns per position, in radians."""
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    theta = rope.theta
    if doublings:
        # Qwen's dynamic NTK: alpha is 3, 7, ... for prompts of up to 2, 4, ... times the trained length.
        theta *= (2.0 ** (doublings + 1) - 1.0) ** (rope.rotary_dim / (rope.rotary_dim - 2))
    plain = 1.0 / theta**exponents
    if rope.scaling is None:
        return plain
    match _kind(rope.scaling):
        case "linear":
            return plain / float(rope.scaling["factor"])
        case "yarn":
            return _yarn(plain, rope, rope.scaling)
        case _:
            return _llama3(plain, rope.scaling)


def _kind(scaling: dict[str, Any]) -> str:
    return str(scaling.get("rope_type") or scaling["type"])


def _llama3(plain: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones stay, those between blend.

    Source: the `llama3` entry of transformers' rope utilities, which follows Meta's release.
    """
    trained, factor = float(scaling["original_max_position_embeddings"]), float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = trained * plain / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * plain / factor + blend * plain


def _yarn(plain: torch.Tensor, rope: RopeConfig, scaling: dict[str, Any]) -> torch.Tensor:
    """YaRN (Peng et al., 2023, section 3.2): pairs that turn rarely within the trained length are divided
    by the factor, those that turn often stay, and between the two lies a ramp over the pairs' numbers."""
    trained, factor = float(scaling["original_max_position_embeddings"]), float(scaling["factor"])

    def pair_with(turns: float) -> float:
        return rope.rotary_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_with(scaling.get("beta_fast") or 32), pair_with(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.rotary_dim - 1)
    pairs = torch.arange(rope.rotary_dim // 2, dtype=torch.float32)
    ramp = ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
    return (1 - ramp) * plain + ramp * plain / factor


def _magnitude(rope: RopeConfig) -> float:
    """YaRN's factor of queries and keys alike: its paper's "attention temperature", section 3.4."""
    scaling = rope.scaling or {}
    if not scaling or _kind(scaling) != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor = math.log(max(1.0, scaling["factor"]))
    whole, part = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if whole and part:
        return float((0.1 * whole * factor + 1.0) / (0.1 * part * factor + 1.0))
    return 0.1 * factor + 1.0
