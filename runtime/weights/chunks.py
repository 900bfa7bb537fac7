"""A plan as runs of files and where in the arena they go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.model.layout import RowRange
from runtime.weights.plan import Piece, Plan


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of a file, and where in the arena it goes.

    Of each `pitch` bytes of the run, `width` from `skip` on are copied; usually that is all of them.
    """

    file: Path
    start: int
    num_bytes: int
    target: int
    skip: int
    width: int
    pitch: int


def chunks_of(plan: Plan, most: int) -> Iterator[Chunk]:
    """Cut everything that the plan reads into chunks of at most `most` bytes, in the order of the plan."""
    for parameter in plan.parameters:
        offset = parameter.offset
        for piece in parameter.pieces:
            share = piece.num_bytes // max(1, piece.shape[0])
            for rows in piece.rows:
                yield from _chunks(piece, rows, offset, most)
                offset += (rows[1] - rows[0]) * share


def _chunks(piece: Piece, rows: RowRange, offset: int, most: int) -> Iterator[Chunk]:
    tensor, (first, last) = piece.tensor, rows
    row_bytes = (tensor.stop - tensor.start) // max(1, tensor.shape[0]) if tensor.shape else tensor.item_bytes
    start, stop = tensor.start + first * row_bytes, tensor.start + last * row_bytes
    skip, width = 0, row_bytes
    if len(tensor.shape) > 1:
        skip, width = (
            piece.columns[0] * tensor.item_bytes,
            (piece.columns[1] - piece.columns[0]) * tensor.item_bytes,
        )
    if width == row_bytes:
        # Whole rows lie close together in the file: where they are cut does not matter.
        yield from _cut(tensor.file, start, stop, offset, most)
    elif row_bytes > most:
        for row in range(last - first):
            at = start + row * row_bytes + skip
            yield from _cut(tensor.file, at, at + width, offset + row * width, most)
    else:
        step = most // row_bytes
        for row in range(0, last - first, step):
            count = min(step, last - first - row)
            at, target = start + row * row_bytes, offset + row * width
            yield Chunk(tensor.file, at, count * row_bytes, target, skip, width, row_bytes)


def _cut(file: Path, start: int, stop: int, target: int, most: int) -> Iterator[Chunk]:
    for at in range(start, stop, most):
        size = min(most, stop - at)
        yield Chunk(file, at, size, target + at - start, 0, size, size)
