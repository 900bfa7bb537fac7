"""Several rows times a quantised weight, in tiles for the tensor cores.

Each program multiplies block_n outputs by block_m rows over a share of the inputs; the weight's tile comes
through a pipeline in shared memory, and is widened in registers. Where few tiles would leave the GPU idle the
inputs are split over programs. The last program of a tile to end adds up all shares in their order, so that
the result does not depend on who that was.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from runtime.kernels.gpu.activation import silu
from runtime.kernels.gpu.language import INTERPRETED, tl, triton
from runtime.kernels.gpu.launch import cdiv, kernel
from runtime.kernels.packed import PackedMatrix

# Room for the partial sums of split products: no more are split than fit.
WORKSPACE_ELEMENTS = 16 << 20
WORKSPACE_TILES = 1 << 12


@dataclass(frozen=True, slots=True)
class TileConfig:
    """How a product is cut up: block_m rows by block_n outputs a program, `splits` shares of the inputs.

    `scales_first` says that weights are scaled before they are multiplied, else their products are.
    """

    block_m: int
    block_n: int
    splits: int
    num_warps: int
    num_stages: int
    scales_first: bool = False


# A share of a product has at least so many inputs: what is won by more shares is lost in adding them up.
_FEWEST_INPUTS = 1536
# Beside the pipeline.
_OTHER_SHARED_BYTES = 1024
# The fastest on an H100 for Qwen2.5-32B from the sizes of products down, each with the rows that it is for
# and the programs that a multiprocessor is given.
_BYTE_TILES = (
    (129, TileConfig(256, 128, 1, 8, 3, True), 1.0),
    (65, TileConfig(128, 128, 1, 8, 3, True), 1.0),
    (33, TileConfig(64, 64, 1, 4, 4), 2.0),
    (17, TileConfig(32, 64, 1, 4, 4), 4.0),
    (0, TileConfig(16, 64, 1, 4, 4), 4.8),
)
_TILES = {
    0: _BYTE_TILES[1:],
    4: (
        (65, TileConfig(128, 128, 1, 8, 3, True), 1.0),
        (33, TileConfig(64, 128, 1, 8, 4), 1.0),
        *_BYTE_TILES[3:],
    ),
    8: _BYTE_TILES,
}


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
    tiles = cdiv(num_rows, config.block_m), cdiv(matrix.out_features, config.block_n)
    if config.splits > 1:
        elements = tiles[0] * tiles[1] * config.splits * config.block_m * config.block_n
        if elements > workspace.partials.numel() or tiles[0] * tiles[1] > workspace.counters.numel():
            raise ValueError(f"the workspace is too small for {elements} partial sums of {tiles} tiles")
    shape = {
        "K": in_features,
        "GROUP": matrix.group_size,
        "GROUPS": matrix.scales.shape[1],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "SPLIT": config.splits > 1,
        "SCALES_FIRST": config.scales_first,
        "HAS_ZEROS": matrix.zeros is not None,
        "HAS_BIAS": bias is not None,
        "GATED": silu_mul,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    shape |= word_shape(matrix) | {"PER_SCALE": matrix.fields_per_scale}
    _tile_kernel[(*tiles, config.splits)](
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
        WIDENING=_widening(matrix.bits, x.dtype) if matrix.bits and _has_instructions(x) else None,
        **shape,
    )
    return out


@functools.cache
def shared_workspace(device: torch.device) -> TileWorkspace:
    """The workspace of all products on a device, which run one after the other."""
    return TileWorkspace.allocate(WORKSPACE_ELEMENTS, WORKSPACE_TILES, device)


def tile_config(matrix: PackedMatrix, num_rows: int, num_sms: int, shared_bytes: int) -> TileConfig:
    """How a product of so many rows is cut up on a GPU of so many multiprocessors, on which a program may
    have so many bytes of shared memory."""
    shape, per_sm = next(
        (shape, per_sm)
        for fewest_rows, shape, per_sm in _TILES[matrix.bits]
        if not fewest_rows or (num_rows >= fewest_rows and tile_bytes(matrix, shape) <= shared_bytes)
    )
    tiles = cdiv(num_rows, shape.block_m) * cdiv(matrix.out_features, shape.block_n)
    wanted = min(int(per_sm * num_sms) // tiles, matrix.in_features // _FEWEST_INPUTS)
    room = WORKSPACE_ELEMENTS // (tiles * shape.block_m * shape.block_n)
    return replace(shape, splits=max(1, min(wanted, room)) if tiles <= WORKSPACE_TILES else 1)


def tile_bytes(matrix: PackedMatrix, shape: TileConfig) -> int:
    """The shared memory that a program's pipeline takes: the weight's words are wanted a stage before x."""
    step = word_shape(matrix)["FIELD"]
    rows = 2 * shape.block_m * step * max(1, matrix.fields)
    words = (2 if matrix.bits else 1) * shape.block_n * step
    return shape.num_stages * rows + (shape.num_stages - 1) * words + _OTHER_SHARED_BYTES


def word_shape(matrix: PackedMatrix) -> dict[str, int]:
    """How kernels step through the values: so many at a time as have one scale."""
    if matrix.bits:
        return {"WORDS": matrix.values.shape[1], "FIELD": matrix.field, "BITS": matrix.bits}
    whole = matrix.scales.shape[1] == 1 or matrix.group_size % 128 == 0
    return {"WORDS": matrix.in_features, "FIELD": 128 if whole else matrix.group_size, "BITS": 0}


def _has_instructions(x: torch.Tensor) -> bool:
    """Whether the device has those of `_widening`; else plain arithmetic does the same."""
    if INTERPRETED:
        return False
    return x.dtype == torch.float16 or _capability(x.device) >= (9, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _widening(bits: int, dtype: torch.dtype) -> tuple[str, ...]:
    """For each field of words of 16 bits, instructions that turn two of them, $1, into two values, $0.

    The bits are put into the last bits of a number whose exponent gives them the weight 1, from which the
    rest of that number is subtracted: in float16 1024 + n has n in its last 10 bits, in bfloat16 128 + n in
    its last 7. Of 8 bits the first is then counted apart: n - 128 is 128 + (the last 7) - (256 or 128). After
    Kim et al., "Who Says Elephants Can't Run", 2022.
    """
    half = dtype == torch.float16
    and_or, and_xor = "0xea", "0x6a"
    if half:
        mask, offset = (0x000F000F, 0x64086408) if bits == 4 else (0x00FF00FF, 0x64806480)
        steps = f"lop3.b32 t, t, {mask:#x}, 0x64006400, {and_or}; mov.b32 u, {offset:#x}; sub.f16x2 $0, t, u;"
    elif bits == 4:
        steps = (
            f"lop3.b32 t, t, 0x000f000f, 0x43004300, {and_or}; mov.b32 u, 0x43084308; sub.bf16x2 $0, t, u;"
        )
    else:
        steps = (
            f"lop3.b32 u, t, 0x00800080, 0x43804380, {and_xor}; "
            f"lop3.b32 t, t, 0x007f007f, 0x43004300, {and_or}; sub.bf16x2 $0, t, u;"
        )
    return tuple(f"{{ .reg .b32 t, u; shr.u32 t, $1, {bits * n}; {steps} }}" for n in range(16 // bits))


@kernel
@triton.jit(do_not_specialize=["num_rows"])
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
    K: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    FIELD: tl.constexpr,
    BITS: tl.constexpr,
    PER_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALES_FIRST: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    WIDENING: tl.constexpr,
):
    FIELDS: tl.constexpr = 16 // BITS if BITS else 1
    output, inside = rows_of(tl.program_id(1), N, BLOCK_N, GATED)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = tl.arange(0, FIELD)
    there, wanted = inside[:, None], (row < num_rows)[None, :]
    values_ptr += output[:, None].to(tl.int64) * WORDS + place[None, :]
    x_ptr += row[None, :].to(tl.int64) * K + place[:, None]
    scales_ptr += output[:, None] * GROUPS
    zeros_ptr += output[:, None] * GROUPS

    chunks: tl.constexpr = (WORDS + FIELD - 1) // FIELD
    splits = tl.num_programs(2)
    first = tl.program_id(2) * chunks // splits
    last = (tl.program_id(2) + 1) * chunks // splits
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for chunk in range(first, last):
        within = (place + chunk * FIELD < WORDS)[None, :] | (WORDS % FIELD == 0)
        words = tl.load(values_ptr + chunk * FIELD, there & within, other=0.0, eviction_policy="evict_first")
        for field in tl.static_range(FIELDS):
            start = (chunk * FIELDS + field) * FIELD
            known = (place + start < K)[:, None] | (K % (FIELDS * FIELD) == 0)
            x = tl.load(x_ptr + start, wanted & known, other=0.0)
            weight = _widened(words, x, BITS, field, WIDENING)
            # Past the last input there is nothing to scale.
            group = tl.minimum(start // GROUP, GROUPS - 1)
            if HAS_ZEROS:
                weight -= tl.load(zeros_ptr + group, there, other=0).to(x.dtype)
            if GROUPS == 1:
                sums = tl.dot(weight, x, sums)
            elif SCALES_FIRST:
                scale = tl.load(scales_ptr + group, there, other=0.0)
                sums = tl.dot(weight * scale.to(x.dtype), x, sums)
            else:
                if field % PER_SCALE == 0:
                    scale = tl.load(scales_ptr + group, there, other=0.0).to(tl.float32)
                    part = tl.dot(weight, x)
                else:
                    part = tl.dot(weight, x, part)
                if (field + 1) % PER_SCALE == 0:
                    sums += part * scale
    is_last = True
    if SPLIT:
        sums, is_last = _all_shares(sums, partials_ptr, counters_ptr, BLOCK_M, BLOCK_N)
    if is_last:
        if GROUPS == 1:
            sums *= tl.load(scales_ptr, there, other=0.0).to(tl.float32)
        if HAS_BIAS:
            sums += tl.load(bias_ptr + output, inside, other=0.0).to(tl.float32)[:, None]
        _store(sums, out_ptr, N, num_rows, BLOCK_M, BLOCK_N, GATED)


@triton.jit
def _store(sums, out_ptr, N, num_rows, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(sums, (BLOCK_N // 2, 2, BLOCK_M)), (0, 2, 1)))
        output = (tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2))[:, None]
        y = silu(gate) * up
    else:
        output = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
        y = sums
    tl.store(out_ptr + row.to(tl.int64) * N + output, y, (output < N) & (row < num_rows))


@triton.jit
def rows_of(tile, N, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """The rows of a weight that a tile of BLOCK_N multiplies, and which of them there are.

    Of gated ones there are N gates and N ups, which take turns.
    """
    index = tl.arange(0, BLOCK_N)
    if GATED:
        output = tile * (BLOCK_N // 2) + index // 2
        row = output + (index % 2) * N
    else:
        output = tile * BLOCK_N + index
        row = output
    return row, output < N


@triton.jit
def _all_shares(sums, partials_ptr, counters_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sums of all programs of a tile, in the last of them to end, and whether this is the one."""
    splits = tl.num_programs(2)
    tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    cell = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    partials_ptr += tile.to(tl.int64) * splits * (BLOCK_N * BLOCK_M) + cell
    tl.store(partials_ptr + tl.program_id(2) * (BLOCK_N * BLOCK_M), sums)
    # All threads have written before one of them says so.
    tl.debug_barrier()
    is_last = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel") == splits - 1
    if is_last:
        tl.store(counters_ptr + tile, 0)
        sums = tl.load(partials_ptr, cache_modifier=".cg")
        for split in range(1, splits):
            sums += tl.load(partials_ptr + split * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
    return sums, is_last


@triton.jit
def _widened(words, x, BITS: tl.constexpr, FIELD_INDEX: tl.constexpr, WIDENING: tl.constexpr):
    """The values in the i-th bits of each word, or of e4m3, in x's dtype."""
    if BITS == 0:
        # By way of float32, which GPUs are much quicker at than at half to bfloat16.
        return words.to(tl.float32).to(x.dtype)
    elif WIDENING is None:
        return integers_of(words, BITS, FIELD_INDEX, x.dtype)
    else:
        return _widen_pairs(words, x, WIDENING, FIELD_INDEX)


@triton.jit
def integers_of(words, BITS: tl.constexpr, FIELD_INDEX: tl.constexpr, DTYPE: tl.constexpr):
    """The values in the i-th bits of each word."""
    integers = (words >> (BITS * FIELD_INDEX)) & ((1 << BITS) - 1)
    return (integers - (1 << (BITS - 1))).to(DTYPE)


@triton.jit
def _widen_pairs(words, x, WIDENING: tl.constexpr, FIELD_INDEX: tl.constexpr):
    """What `integers_of` does, two words at a time; see `_widening`."""
    return tl.inline_asm_elementwise(
        WIDENING[FIELD_INDEX], "=r,r", [words], dtype=x.dtype, is_pure=True, pack=2
    )
