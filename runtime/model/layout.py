"""The vocabulary in which a family says how its checkpoint fills the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# How a tensor is divided among the ranks of a tensor-parallel group. `rows` and `columns` cut evenly;
# `heads` and `kv_heads` cut by whole heads, and a KV head that fewer ranks can own is held by several;
# `vocabulary` cuts rows, padded to a multiple of the group; None means that every rank holds it whole.
Split = Literal["rows", "columns", "heads", "kv_heads", "vocabulary"] | None


@dataclass(frozen=True)
class Part:
    """One checkpoint tensor, with the shape it must have, and how ranks share it."""

    tensor: str
    shape: tuple[int, ...]
    split: Split = None


@dataclass(frozen=True)
class Parameter:
    """One parameter of the decoder: its parts, stacked along the first axis in this order."""

    name: str
    parts: tuple[Part, ...]
