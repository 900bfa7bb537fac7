"""Several rows times a quantised weight, in tiles for the tensor cores.

Each program multiplies block_n outputs by block_m rows over a share of the inputs; the weight's tile comes
through a pipeline in shared memory, and is widened in registers. Where few tiles would leave the GPU idle the
inputs are split over programs. The last program of a tile to end adds up all shares in their order, so that
the result does not depend on who that was.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from runtime.kernels.gpu.activation import silu
from runtime.kernels.gpu.early import early_launch, let_next_start, wait
from runtime.kernels.gpu.language import tl, triton
from runtime.kernels.gpu.launch import cdiv, kernel
from runtime.kernels.gpu.packed_config import WORKSPACE_ELEMENTS, WORKSPACE_TILES, TileConfig
from runtime.kernels.gpu.packed_sums import scaled_sums, sums_of_scaled
from runtime.kernels.gpu.packed_words import has_instructions, row_start, rows_of, widening, word_shape
from runtime.kernels.packed import PackedMatrix


@dataclass(frozen=True, slots=True)
class TileWorkspace:
    """What the programs of split products leave for each other; `counters` are zero between products."""

    partials: torch.Tensor
    counters: torch.Tensor

    @staticmethod
    def allocate(elements: int, tiles: int, device: torch.device | str) -> TileWorkspace:
        """Room for `elements` partial sums of `tiles` tiles."""
        return TileWorkspace(
            torch.empty(elements, dtype=torch.float32, device=device),
            torch.zeros(tiles, dtype=torch.int32, device=device),
        )


def packed_tiles(
    x: torch.Tensor,
    matrix: PackedMatrix,
    out: torch.Tensor,
    config: TileConfig,
    workspace: TileWorkspace,
    bias: torch.Tensor | None = None,
    silu_mul: bool = False,
) -> torch.Tensor:
    """out = x W^T + bias, or with `silu_mul` silu(gate) * up of its two halves.

    x     [m, in_features] float16 or bfloat16, contiguous
    bias  [out_features]
    out   [m, n] of any floating type, contiguous, where n is out_features, or half of it with silu_mul

    Sums are float32, rounded once at the end. Returns out. Raises ValueError if the workspace is too small.
    """
    num_rows, in_features = x.shape
    tiles = cdiv(num_rows, config.block_m) * cdiv(matrix.out_features, config.block_n)
    whole = config.whole if config.splits > 1 else tiles
    parts = (tiles - whole) * config.splits
    room = parts * config.block_m * config.block_n <= workspace.partials.numel()
    if not room or tiles - whole > len(workspace.counters):
        raise ValueError(f"the workspace is too small for {parts} parts of {tiles - whole} tiles")
    shape = {
        "K": in_features,
        "GROUP": matrix.group_size,
        "GROUPS": matrix.groups,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "SCALES_FIRST": config.scales_first,
        "HAS_ZEROS": matrix.zeros is not None,
        "HAS_BIAS": bias is not None,
        "GATED": silu_mul,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **early_launch(),
    }
    shape |= word_shape(matrix) | {"PER_SCALE": matrix.fields_per_scale}
    shape["STEP"] = min(config.step, shape["FIELD"])
    scaled = config.scales_first and matrix.groups > 1 and matrix.zeros is None
    _tile_kernel[(whole + parts,)](
        x,
        matrix.values,
        matrix.scales,
        matrix.scales if matrix.zeros is None else matrix.zeros,
        matrix.scales if bias is None else bias,
        out,
        workspace.partials,
        workspace.counters,
        matrix.out_features // 2 if silu_mul else matrix.out_features,
        num_rows,
        whole,
        config.splits,
        WIDENING=widening(matrix.bits, x.dtype, scaled) if matrix.bits and has_instructions(x) else None,
        **shape,
    )
    return out


@functools.cache
def shared_workspace(device: torch.device) -> TileWorkspace:
    """The workspace of all products on a device, which run one after the other."""
    return TileWorkspace.allocate(WORKSPACE_ELEMENTS, WORKSPACE_TILES, device)


@kernel
@triton.jit(do_not_specialize=["num_rows", "whole", "splits"])
def _tile_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    partials_ptr,
    counters_ptr,
    N,
    num_rows,
    whole,
    splits,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    FIELD: tl.constexpr,
    BITS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    PER_SCALE: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALES_FIRST: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    WIDENING: tl.constexpr,
    EARLY: tl.constexpr,
):
    chunks: tl.constexpr = (WORDS + FIELD - 1) // FIELD
    tile, first, last = tl.program_id(0), 0, chunks
    share = 0
    if tile >= whole:
        share = (tile - whole) % splits
        tile = whole + (tile - whole) // splits
        first, last = share * chunks // splits, (share + 1) * chunks // splits
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    row_tile, output_tile = tile % tiles_m, tile // tiles_m
    output, inside = rows_of(output_tile, N, BLOCK_N, GATED)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    there = inside[:, None]
    outputs = 2 * N if GATED else N
    values_ptr += row_start(output, WORDS, FIELD, ROW_BLOCK)[:, None]
    x_ptr += row[None, :].to(tl.int64) * K
    wanted = (row < num_rows)[None, :]
    wait(EARLY)
    if SCALES_FIRST:
        sums = sums_of_scaled(
            x_ptr, values_ptr, scales_ptr, zeros_ptr, output, inside, wanted, first, last, outputs,
            K, GROUP, GROUPS, WORDS, FIELD, BITS, ROW_BLOCK, PER_SCALE, STEP, BLOCK_M, BLOCK_N, HAS_ZEROS,
            WIDENING,
        )  # fmt: skip
    else:
        sums = scaled_sums(
            x_ptr, values_ptr, scales_ptr, zeros_ptr, output, inside, wanted, first, last, outputs,
            K, GROUP, GROUPS, WORDS, FIELD, BITS, ROW_BLOCK, PER_SCALE, BLOCK_M, BLOCK_N, HAS_ZEROS,
            WIDENING,
        )  # fmt: skip
    let_next_start(EARLY)
    is_last = tile < whole
    if not is_last:
        sums, is_last = _all_shares(
            sums, partials_ptr, counters_ptr, tile - whole, share, splits, BLOCK_M, BLOCK_N
        )
    if is_last:
        if GROUPS == 1:
            sums *= tl.load(scales_ptr + output[:, None], there, other=0.0).to(tl.float32)
        if HAS_BIAS:
            sums += tl.load(bias_ptr + output, inside, other=0.0).to(tl.float32)[:, None]
        _store(sums, out_ptr, row_tile, output_tile, N, num_rows, BLOCK_M, BLOCK_N, GATED)


@triton.jit
def _store(
    sums,
    out_ptr,
    row_tile,
    output_tile,
    N,
    num_rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GATED: tl.constexpr,
):
    row = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(sums, (BLOCK_N // 2, 2, BLOCK_M)), (0, 2, 1)))
        output = (output_tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2))[:, None]
        y = silu(gate) * up
    else:
        output = (output_tile * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
        y = sums
    tl.store(out_ptr + row.to(tl.int64) * N + output, y, (output < N) & (row < num_rows))


@triton.jit
def _all_shares(
    sums, partials_ptr, counters_ptr, tile, share, splits, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The sums of all programs of a split tile, in the last of them to end, and whether this is the one."""
    AT_ONCE: tl.constexpr = 4 if BLOCK_M <= 16 else 1
    cell = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    partials_ptr += tile.to(tl.int64) * splits * (BLOCK_N * BLOCK_M) + cell
    tl.store(partials_ptr + share * (BLOCK_N * BLOCK_M), sums)
    # All threads have written before one of them says so.
    tl.debug_barrier()
    is_last = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel") == splits - 1
    if is_last:
        tl.store(counters_ptr + tile, 0)
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        # Several at a time: each comes from far away.
        for first in range(0, splits, AT_ONCE):
            for each in tl.static_range(AT_ONCE):
                which = tl.zeros_like(cell) + (first + each)
                partial_ptr = partials_ptr + which * (BLOCK_N * BLOCK_M)
                sums += tl.load(partial_ptr, which < splits, other=0.0, cache_modifier=".cg")
    return sums, is_last
