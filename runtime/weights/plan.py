"""Checkpoint tensors + the model's layout + a rank -> which bytes land where in the arena.

Made from headers alone, before torch is imported. On a device the arena is one allocation and a
parameter's pieces are neighbours in it; on the CPU the arena is the mapped files themselves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import FirstlightError
from runtime.model.config import ModelConfig
from runtime.model.families import Model
from runtime.model.layout import Holds, Part, RowRange
from runtime.model.quantization import spelled
from runtime.weights.checkpoint import CheckpointError, TensorInfo

# What the arena's parameters start at: a multiple that every device's widest loads are happy with.
ALIGNMENT = 256
# Of rows that are cut, parts of this size are read one by one. As in native/readers.c.
MIN_PART_BYTES = 1024
DTYPES: dict[Holds, tuple[str, ...]] = {
    "floats": ("F32", "F16", "BF16"), "int32": ("I32",), "e4m3": ("F8_E4M3",),
}  # fmt: skip


class PlanError(FirstlightError):
    """A model that cannot be divided among the ranks as asked."""


@dataclass(frozen=True)
class Piece:
    """What this rank needs of one checkpoint tensor: some ranges of rows, of each the same columns.

    The tensor is seen as [rows, columns], columns being all but the first axis.
    """

    tensor: TensorInfo
    rows: tuple[RowRange, ...]
    columns: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The piece's own shape: one axis for a vector, else two."""
        count = sum(last - first for first, last in self.rows)
        return (count,) if len(self.tensor.shape) == 1 else (count, self.columns[1] - self.columns[0])

    @property
    def num_bytes(self) -> int:
        """Bytes this rank takes of the tensor."""
        return math.prod(self.shape) * self.tensor.item_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes that are read for it: narrow parts come with the rest of their rows."""
        row = math.prod(self.tensor.shape[1:]) * self.tensor.item_bytes
        part = self.num_bytes // max(1, self.shape[0])
        return self.num_bytes if part >= MIN_PART_BYTES else self.num_bytes // max(1, part) * row


@dataclass(frozen=True)
class PlannedParameter:
    """One parameter on this rank: its pieces, one after the other from `offset` in the arena.

    `stacked` says that they are one tensor there, being rows of the same width.
    """

    name: str
    pieces: tuple[Piece, ...]
    offset: int
    stacked: bool = True


@dataclass(frozen=True)
class Plan:
    """Everything that one rank loads."""

    parameters: tuple[PlannedParameter, ...]
    arena_bytes: int

    @property
    def files(self) -> list[Path]:
        """The files that are read, each once, in the order they are first needed."""
        return list(
            dict.fromkeys(piece.tensor.file for parameter in self.parameters for piece in parameter.pieces)
        )

    @functools.cached_property
    def read_bytes(self) -> int:
        """Bytes that this rank takes from the files."""
        return sum(piece.num_bytes for parameter in self.parameters for piece in parameter.pieces)

    @functools.cached_property
    def file_bytes(self) -> int:
        """Bytes of the files that are read for that."""
        return sum(piece.file_bytes for parameter in self.parameters for piece in parameter.pieces)


def make_plan(model: Model, tensors: dict[str, TensorInfo], rank: int = 0, world_size: int = 1) -> Plan:
    """Plan what `rank` of `world_size` loads. Raises `CheckpointError` and `PlanError`."""
    check_world_size(model.config, world_size)
    planned = []
    offset = 0
    quantization = model.config.quantization
    for parameter in (each for one in model.parameters for each in spelled(one, tensors, quantization)):
        pieces = tuple(
            piece
            for part in parameter.parts
            for piece in _pieces(part, tensors, model.config, rank, world_size)
        )
        if len({piece.tensor.dtype for piece in pieces}) > 1:
            kinds = ", ".join(f"{piece.tensor.name}: {piece.tensor.dtype}" for piece in pieces)
            raise CheckpointError(f"Tensors that are computed together differ in dtype ({kinds}).")
        planned.append(PlannedParameter(parameter.name, pieces, offset, parameter.stacked))
        size = sum(piece.num_bytes for piece in pieces)
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    return Plan(tuple(planned), offset)


def plan_all(tensors: dict[str, TensorInfo]) -> Plan:
    """Plan to load every tensor whole, under its own name."""
    planned = []
    offset = 0
    for name, tensor in tensors.items():
        rows = tensor.shape[0] if tensor.shape else 1
        piece = Piece(tensor, ((0, rows),), (0, math.prod(tensor.shape[1:])))
        planned.append(PlannedParameter(name, (piece,), offset))
        offset += -(-piece.num_bytes // ALIGNMENT) * ALIGNMENT
    return Plan(tuple(planned), offset)


def check_world_size(config: ModelConfig, world_size: int) -> None:
    """Refuse a tensor-parallel size that the model's heads, MLP or quantised groups do not divide by."""
    fits = [n for n in range(1, config.num_heads + 1) if _divides(config, n) and _keeps_groups(config, n)]
    if world_size not in fits:
        quantization = config.quantization
        groups = "" if quantization is None else f", weights in groups of {quantization.group_size}"
        raise PlanError(
            f"--tensor-parallel-size {world_size} does not fit this model ({config.num_heads} heads, "
            f"{config.num_kv_heads} key/value heads, "
            f"MLP width {config.intermediate_size}{groups}). These sizes fit: {fits}."
        )


def _divides(config: ModelConfig, world_size: int) -> bool:
    kv_heads = config.num_kv_heads
    shares_kv = kv_heads % world_size == 0 or world_size % kv_heads == 0
    return config.num_heads % world_size == 0 and config.intermediate_size % world_size == 0 and shares_kv


def _keeps_groups(config: ModelConfig, world_size: int) -> bool:
    """Whether the inputs that share a scale stay together where layers are cut by their inputs."""
    quantization = config.quantization
    if world_size == 1 or quantization is None or quantization.group_size < 0 or not quantization.in_order:
        return True
    widths = (config.num_heads * config.head_dim, config.intermediate_size)
    return all(width // world_size % quantization.group_size == 0 for width in widths)


def _pieces(
    part: Part, tensors: dict[str, TensorInfo], config: ModelConfig, rank: int, world_size: int
) -> list[Piece]:
    tensor = _checked(part, tensors)
    length = part.shape[part.output_axis] if part.shape else 1
    outputs = part.rows or ((0, length),)
    count = sum(last - first for first, last in outputs)
    inputs = math.prod(part.shape) // max(1, length)
    share, wide = (0, count), (0, inputs)
    match part.split:
        case "columns":
            wide = _share(part, inputs, rank, world_size)
        case "rows" | "heads":
            share = _share(part, count, rank, world_size)
        case "kv_heads":
            ranks = min(world_size, config.num_kv_heads)
            share = _share(part, count, rank * ranks // world_size, ranks)
        case "vocabulary":
            step = -(-count // world_size)
            share = min(rank * step, count), min((rank + 1) * step, count)
    taken = tuple(_cut(outputs, *share))
    if part.output_axis == 0:
        return [Piece(tensor, taken, wide)]
    return [Piece(tensor, (wide,), each) for each in taken]


def _checked(part: Part, tensors: dict[str, TensorInfo]) -> TensorInfo:
    """The part's tensor, which is as the config says."""
    tensor = tensors.get(part.tensor)
    if tensor is None:
        raise CheckpointError(
            f"Tensor {part.tensor} is not in the checkpoint, though config.json implies it."
        )
    if tensor.shape != part.shape:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}; "
            f"config.json implies {list(part.shape)}."
        )
    dtypes = DTYPES[part.holds]
    if tensor.dtype not in dtypes:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name} has dtype {tensor.dtype}; {', '.join(dtypes)} can be read."
        )
    return tensor


def _cut(ranges: Iterable[RowRange], start: int, stop: int) -> Iterator[RowRange]:
    """Those of the ranges' rows that are number `start` to `stop` among them."""
    at = 0
    for first, last in ranges:
        low, high = max(start - at, 0), min(stop - at, last - first)
        if low < high:
            yield first + low, first + high
        at += last - first


def _share(part: Part, size: int, rank: int, world_size: int) -> tuple[int, int]:
    if size % world_size:
        raise PlanError(
            f"--tensor-parallel-size {world_size} does not fit this model: {size} rows or columns of "
            f"{part.tensor} do not divide."
        )
    return size * rank // world_size, size * (rank + 1) // world_size
