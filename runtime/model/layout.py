"""The vocabulary in which a family says how its checkpoint fills the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# How a tensor is divided among the ranks of a tensor-parallel group. `rows` and `columns` cut evenly;
# `heads` and `kv_heads` cut by whole heads, and a KV head that fewer ranks can own is held by several;
# `vocabulary` cuts rows, padded to a multiple of the group; None means that every rank holds it whole.
Split = Literal["rows", "columns", "heads", "kv_heads", "vocabulary"] | None
# What a tensor may hold: floating point of 16 or 32 bits, int32, or float8_e4m3fn.
Holds = Literal["floats", "int32", "e4m3"]
# From the first row to the one after the last.
RowRange = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """What a parameter takes of one checkpoint tensor.

    `shape` is the shape that the whole tensor must have. `rows` are the ranges that are taken of it, one
    after the other, None for all rows; `split` is how ranks share what is taken. Where outputs lie along the
    second axis, `output_axis` is 1, and `rows` and `split` mean its columns as they would mean rows.
    """

    tensor: str
    shape: tuple[int, ...]
    split: Split = None
    rows: tuple[RowRange, ...] | None = None
    output_axis: int = 0
    holds: Holds = "floats"


@dataclass(frozen=True)
class Parameter:
    """One parameter of the decoder: its parts, stacked along the first axis in this order, or kept apart."""

    name: str
    parts: tuple[Part, ...]
    stacked: bool = True


def whole(name: str, tensor: str, *shape: int, split: Split = None) -> Parameter:
    """A parameter that is one tensor."""
    return Parameter(name, (Part(tensor, shape, split),))


def stacked(name: str, parts: Sequence[tuple[str, int, Split]], *columns: int) -> Parameter:
    """A parameter whose parts are tensors of their own, given as (tensor, rows, split)."""
    return Parameter(name, tuple(Part(tensor, (rows, *columns), split) for tensor, rows, split in parts))


def packed(name: str, tensor: str, parts: Sequence[tuple[int, Split]], *columns: int) -> Parameter:
    """A parameter whose parts, given as (rows, split), are stacked in one tensor of the checkpoint."""
    total = sum(rows for rows, _ in parts)
    taken = []
    at = 0
    for rows, split in parts:
        taken.append(Part(tensor, (total, *columns), split, ((at, at + rows),)))
        at += rows
    return Parameter(name, tuple(taken))
