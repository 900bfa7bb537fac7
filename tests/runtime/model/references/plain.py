"""The few operations that the references have in common, in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def save(directory: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """Write config.json and random weights; returns the weights."""
    random = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=random)
        is_norm = len(shape) == 1 and name.endswith("weight")
        tensors[name] = 1 + 0.3 * values if is_norm else 0.3 * values
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return tensors


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def angles(length: int, dims: int, base: float) -> torch.Tensor:
    """[length, dims / 2]: position times base ** (-2 k / dims)."""
    frequencies = torch.tensor([base ** (-2 * k / dims) for k in range(dims // 2)])
    return torch.arange(length)[:, None] * frequencies[None]


def turn_halves(x: torch.Tensor, turned: torch.Tensor) -> torch.Tensor:
    """x [T, heads, dims]: the first half of the dimensions turns with the second."""
    cos, sin = turned.cos()[:, None], turned.sin()[:, None]
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def turn_pairs(x: torch.Tensor, turned: torch.Tensor) -> torch.Tensor:
    """x [T, heads, dims]: each even dimension turns with the odd one after it."""
    cos, sin = turned.cos()[:, None], turned.sin()[:, None]
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 1::2] * cos + x[..., 0::2] * sin
    return out


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """q [T, heads, dim], k and v [T, kv_heads, dim], bias [heads, T, T] -> [T, heads * dim], causal."""
    length, heads, dim = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / dim**0.5
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
