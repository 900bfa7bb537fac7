"""How products of several rows with a quantised weight are cut up into tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace

from runtime.kernels.gpu.launch import cdiv
from runtime.kernels.gpu.packed_words import word_shape
from runtime.kernels.packed import PackedMatrix

# Room for the partial sums of split products: no more are split than fit.
WORKSPACE_ELEMENTS = 16 << 20
WORKSPACE_TILES = 1 << 12


@dataclass(frozen=True, slots=True)
class TileConfig:
    """How a product is cut up: into tiles of block_m rows by block_n outputs, a program each, but for those
    after the first `whole`, whose inputs are split over `splits` programs.

    `scales_first` says that weights are scaled before they are multiplied, `step` words of each output at a
    time, else their products are. Then four warps are best given 128 outputs: their values come out of shared
    memory as the tensor cores take them.
    """

    block_m: int
    block_n: int
    splits: int
    num_warps: int
    num_stages: int
    scales_first: bool = False
    whole: int = 0
    step: int = 64


# A share of a product has at least so many inputs: what is won by more shares is lost in adding them up.
_FEWEST_INPUTS = {0: 1536, 4: 1024, 8: 1536}
# Beside the pipeline.
_OTHER_SHARED_BYTES = 1024
# The fastest on an H200 for Qwen2.5-32B from the sizes of products down, each with the rows that it is for
# and the programs that a multiprocessor is given.
_FEW_ROWS = (
    (33, TileConfig(64, 64, 1, 4, 3), 2.0),
    (17, TileConfig(32, 64, 1, 4, 4), 4.0),
    (0, TileConfig(16, 64, 1, 4, 4), 4.8),
)
_MANY_ROWS = TileConfig(128, 128, 1, 8, 3, True, step=32)
_TILES = {
    0: ((65, replace(_MANY_ROWS, step=64), 1.0), *_FEW_ROWS),
    4: (
        (65, _MANY_ROWS, 1.0),
        (33, TileConfig(64, 128, 1, 8, 4), 1.0),
        (17, TileConfig(32, 64, 1, 4, 4), 4.0),
        (9, TileConfig(16, 64, 1, 4, 4), 4.8),
        (0, TileConfig(8, 32, 1, 2, 3), 12.0),
    ),
    8: ((65, _MANY_ROWS, 1.0), *_FEW_ROWS),
}
# GPUs whose tensor cores multiply by themselves while a program goes on have this much shared memory, and
# take larger tiles: weights need not wait in registers for their turn.
_BY_THEMSELVES_SHARED_BYTES = 227 << 10
_WIDE = TileConfig(128, 256, 1, 8, 4, True, step=32)
_WIDE_TILES = {
    0: ((65, TileConfig(128, 128, 1, 4, 3, True), 2.0),),
    4: ((65, replace(_WIDE, num_stages=3), 1.0),),
    8: (
        (193, _WIDE, 1.0),
        (129, TileConfig(64, 256, 1, 8, 3, True), 1.0),
        (65, _WIDE, 1.0),
    ),
}


def tile_config(matrix: PackedMatrix, num_rows: int, num_sms: int, shared_bytes: int) -> TileConfig:
    """How a product of so many rows is cut up on a GPU of so many multiprocessors, on which a program may
    have so many bytes of shared memory."""
    wide = _WIDE_TILES[matrix.bits] if shared_bytes >= _BY_THEMSELVES_SHARED_BYTES else ()
    shape, per_sm = next(
        (shape, per_sm)
        for fewest_rows, shape, per_sm in (*wide, *_TILES[matrix.bits])
        if not fewest_rows or (num_rows >= fewest_rows and tile_bytes(matrix, shape) <= shared_bytes)
    )
    tiles = cdiv(num_rows, shape.block_m) * cdiv(matrix.out_features, shape.block_n)
    programs = int(per_sm * num_sms)
    # What does not fill the GPU once more is split, so that all of it ends at the same time.
    whole = tiles // programs * programs
    rest = tiles - whole
    if not rest or rest > WORKSPACE_TILES:
        return shape
    wanted = min(programs // rest, matrix.in_features // _FEWEST_INPUTS[matrix.bits])
    room = WORKSPACE_ELEMENTS // (rest * shape.block_m * shape.block_n)
    return replace(shape, splits=max(1, min(wanted, room)), whole=whole)


def tile_bytes(matrix: PackedMatrix, shape: TileConfig) -> int:
    """The shared memory that a program's pipeline takes: the weight's words are wanted a stage before x."""
    field = word_shape(matrix)["FIELD"]
    step = min(shape.step, field) if shape.scales_first else field
    rows = 2 * shape.block_m * step * max(1, matrix.fields)
    words = (2 if matrix.bits else 1) * shape.block_n * step
    return shape.num_stages * rows + (shape.num_stages - 1) * words + _OTHER_SHARED_BYTES
