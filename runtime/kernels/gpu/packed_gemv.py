"""One row times a quantised weight: the time is that of reading the weight once.

Each program takes some rows of the weight whole and multiplies by plain arithmetic, as `gemv.py` does; no
sum is split over programs. A thread's share of a row is a run of neighbours, which has one scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from runtime.kernels.gpu.activation import silu
from runtime.kernels.gpu.early import begin, early_launch
from runtime.kernels.gpu.language import INTERPRETED, tl, triton
from runtime.kernels.gpu.launch import cdiv, kernel
from runtime.kernels.gpu.packed_words import per_group, row_start, rows_of, word_shape
from runtime.kernels.packed import PackedMatrix, dequantize_torch

# Neighbouring numbers of 8 bits that a thread takes at once.
_BYTES_RUN = tl.constexpr(8)


@dataclass(frozen=True, slots=True)
class PackedGemvConfig:
    """block_n rows of the weight a program, block_bytes of each at a time; of words, a thread takes a run of
    so many of 32 bits."""

    block_n: int
    block_bytes: int
    num_warps: int
    run: int = 2


# Numbers in float32 with room for integers in some of their bits: 2^23 in its last ones, 1 in its first ones.
# They come as an argument because an instruction that takes some bits of a word and sets others can hold one
# constant only.
_MAGIC = {8: 0x4B000000, 4: 0x3F800000}
# Instructions that put the i-th byte of $1 in the place of the last byte of $2.
_PERMUTE = tuple(f"prmt.b32 $0, $1, $2, {0x7650 + index};" for index in range(4))
# The fastest on an H200 for Qwen2.5-32B, by the bits of integers, 0 for e4m3, and whether they are gated.
_CONFIGS = {
    (0, False): PackedGemvConfig(4, 1024, 4),
    (0, True): PackedGemvConfig(4, 1024, 4),
    (4, False): PackedGemvConfig(4, 512, 2, 2),
    (4, True): PackedGemvConfig(4, 512, 1, 4),
    (8, False): PackedGemvConfig(4, 1024, 2, 4),
    (8, True): PackedGemvConfig(4, 2048, 2, 8),
}
# Taking integers of 4 bits apart keeps plain arithmetic busier than reading them keeps the memory: from this
# size on, the tensor cores are faster even if most of what they do is thrown away.
_MOST_BYTES_OF_4_BITS = 40 << 20


def suits_gemv(matrix: PackedMatrix) -> bool:
    """Whether `packed_gemv` is the fastest way of multiplying one row."""
    return matrix.bits != 4 or matrix.values.nbytes < _MOST_BYTES_OF_4_BITS


def packed_gemv(
    x: torch.Tensor,
    matrix: PackedMatrix,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    silu_mul: bool = False,
    config: PackedGemvConfig | None = None,
) -> torch.Tensor:
    """out = x W^T + bias, or with `silu_mul` silu(gate) * up of its two halves.

    x     [1, in_features] float16 or bfloat16, contiguous, of an even length
    bias  [out_features]
    out   [1, n] of any floating type, where n is out_features, or half of it with silu_mul

    Products and sums are float32, rounded once at the end. Returns out.
    """
    if x.shape[0] != 1:
        raise ValueError(f"packed_gemv takes one row, not {x.shape[0]}")
    config = config or _CONFIGS[matrix.bits, silu_mul]
    outputs = matrix.out_features // 2 if silu_mul else matrix.out_features
    grid = (cdiv(outputs, config.block_n // 2 if silu_mul else config.block_n),)
    zeros = matrix.scales if matrix.zeros is None else matrix.zeros
    operands = (matrix.scales, zeros, matrix.scales if bias is None else bias, out, outputs)
    shape = {
        "K": matrix.in_features,
        "GROUP": matrix.group_size,
        "GROUPS": matrix.groups,
        "BLOCK_N": config.block_n,
        "HAS_ZEROS": matrix.zeros is not None,
        "HAS_BIAS": bias is not None,
        "GATED": silu_mul,
        "num_warps": config.num_warps,
        **early_launch(),
    }
    if matrix.bits:
        words = word_shape(matrix)
        _words_kernel[grid](
            x,
            x.view(torch.int32),
            matrix.values.view(torch.int32),
            *operands,
            _MAGIC[matrix.bits],
            WORDS=words["WORDS"] // 2,
            FIELD=words["FIELD"],
            BITS=matrix.bits,
            ROW_BLOCK=words["ROW_BLOCK"],
            PER_SCALE=matrix.fields_per_scale,
            BLOCK_W=config.block_bytes // 4,
            RUN=config.run,
            PERMUTE=_PERMUTE if matrix.bits == 8 and not INTERPRETED else None,
            **shape,
        )
    else:
        _bytes_kernel[grid](x, matrix.values, *operands, BLOCK_K=config.block_bytes, **shape)
    return out


@kernel
@triton.jit(do_not_specialize=["magic"])
def _words_kernel(
    x_ptr,
    pairs_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    N,
    magic,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    FIELD: tl.constexpr,
    BITS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    PER_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    RUN: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    PERMUTE: tl.constexpr,
    EARLY: tl.constexpr,
):
    RUNS: tl.constexpr = BLOCK_W // RUN
    FIELDS: tl.constexpr = 16 // BITS
    outputs = 2 * N if GATED else N
    row, inside = rows_of(tl.program_id(0), N, BLOCK_N, GATED)
    run = tl.arange(0, RUNS) * RUN
    lane = tl.arange(0, RUN)[None, :]
    half: tl.constexpr = FIELD // 2
    rows_ptr = words_ptr + row_start(row, WORDS, half, ROW_BLOCK)[None, :, None]
    sums = tl.zeros((RUNS, BLOCK_N), tl.float32)
    # Words come a block ahead: what is under way is what keeps the memory busy.
    ahead = _words(rows_ptr, run, lane, inside, 0, WORDS, half, ROW_BLOCK, BLOCK_W)
    begin(EARLY)
    for start in tl.static_range(0, WORDS, BLOCK_W):
        words = ahead
        if start + BLOCK_W < WORDS:
            ahead = _words(rows_ptr, run, lane, inside, start + BLOCK_W, WORDS, half, ROW_BLOCK, BLOCK_W)
        within = (start + run[:, None] + lane < WORDS) | (WORDS % BLOCK_W == 0)
        # A chunk of FIELDS * FIELD inputs is FIELD / 2 of these words, each of which is two of 16 bits.
        chunk, place = (start + run) // half, (start + run) % half
        products = tl.zeros((RUNS, BLOCK_N, RUN), tl.float32)
        x_sums = tl.zeros((RUNS, RUN), tl.float32)
        offsets = tl.zeros((RUNS, RUN), tl.float32)
        for field in tl.static_range(FIELDS):
            first = (chunk * FIELDS + field) * FIELD
            pair = (first // 2 + place)[:, None] + lane
            pairs = tl.load(pairs_ptr + pair, within & (pair < K // 2), other=0)
            even, odd = _halves(pairs, x_ptr.dtype.element_ty)
            if HAS_ZEROS:
                x_sums += even + odd
            if BITS == 8:
                products += _byte(words, magic, field, PERMUTE) * even[:, None, :]
                products += _byte(words, magic, field + 2, PERMUTE) * odd[:, None, :]
            else:
                low, high, size = _nibbles(words, magic, field)
                products += low * (even * size)[:, None, :]
                products += high * (odd * size)[:, None, :]
                offsets += (even + odd) * (size + 8.0)
            if (field + 1) % PER_SCALE == 0:
                part = tl.sum(products, 2)
                if BITS == 4:
                    part -= tl.sum(offsets, 1)[:, None]
                    offsets = tl.zeros((RUNS, RUN), tl.float32)
                group, some = row[None, :], inside[None, :]
                if GROUPS > 1:
                    group = per_group(row[None, :], (first // GROUP)[:, None], outputs, GROUPS, BITS)
                    some = some & (first < K)[:, None]
                if HAS_ZEROS:
                    zeros = tl.load(zeros_ptr + group, some, other=0).to(tl.float32)
                    part -= zeros * tl.sum(x_sums, 1)[:, None]
                    x_sums = tl.zeros((RUNS, RUN), tl.float32)
                if GROUPS > 1:
                    part *= tl.load(scales_ptr + group, some, other=0.0).to(tl.float32)
                sums += part
                products = tl.zeros((RUNS, BLOCK_N, RUN), tl.float32)
    y = tl.sum(sums, 0)
    if GROUPS == 1:
        y *= tl.load(scales_ptr + row, inside, other=0.0).to(tl.float32)
    _store(y, row, inside, bias_ptr, out_ptr, N, BLOCK_N, HAS_BIAS, GATED)


@triton.jit
def _words(
    rows_ptr,
    run,
    lane,
    inside,
    start,
    WORDS: tl.constexpr,
    HALF: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The words of some rows from one on, [runs, rows, words of a run]."""
    within = (start + run[:, None] + lane < WORDS) | (WORDS % BLOCK_W == 0)
    chunk, place = (start + run) // HALF, (start + run) % HALF
    where = (chunk * (ROW_BLOCK * HALF) + place)[:, None] + lane
    mask = within[:, None, :] & inside[None, :, None]
    return tl.load(rows_ptr + where[:, None, :], mask, other=0, eviction_policy="evict_first")


@triton.jit
def _byte(words, magic, INDEX: tl.constexpr, PERMUTE: tl.constexpr):
    """The values in the i-th byte of each word, in float32: 2^23 + n has n in its last bits."""
    if PERMUTE is not None:
        bits = tl.inline_asm_elementwise(
            PERMUTE[INDEX], "=r,r,r", [words, magic], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        bits = ((words >> (8 * INDEX)) & 255) | magic
    return bits.to(tl.float32, bitcast=True) - (8388608 + 128)


@triton.jit
def _nibbles(words, magic, FIELD_INDEX: tl.constexpr):
    """1 + n / size in float32, for the integers n of a field in both halves of each word, and that size.

    Two fields are shifted together, to the bits 15 to 22 of a number of which these are the first after the
    point: one field counts 1 / 256 and the other 1 / 16.
    """
    mask: tl.constexpr = 0x780000 if FIELD_INDEX % 2 else 0x78000
    size: tl.constexpr = 16.0 if FIELD_INDEX % 2 else 256.0
    if FIELD_INDEX < 2:
        low, high = words << 15, words >> 1
    else:
        low, high = words << 7, words >> 9
    low, high = (low & mask) | magic, (high & mask) | magic
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True), size


@triton.jit
def _halves(pairs, DTYPE: tl.constexpr):
    """The two numbers of 16 bits in each word, the lower one first, in float32."""
    low = pairs.to(tl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@kernel
@triton.jit
def _bytes_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    N,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    EARLY: tl.constexpr,
):
    tl.static_assert(not HAS_ZEROS)
    begin(EARLY)
    outputs = 2 * N if GATED else N
    row, inside = rows_of(tl.program_id(0), N, BLOCK_N, GATED)
    run = tl.arange(0, BLOCK_K // _BYTES_RUN) * _BYTES_RUN
    lane = tl.arange(0, _BYTES_RUN)[None, :]
    rows_ptr = values_ptr + row[None, :, None].to(tl.int64) * K
    sums = tl.zeros((BLOCK_K // _BYTES_RUN, BLOCK_N), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        column = start + run[:, None] + lane
        within = (column < K) | (K % BLOCK_K == 0)
        mask = within[:, None, :] & inside[None, :, None]
        x = tl.load(x_ptr + column, within, other=0.0).to(tl.float32)[:, None, :]
        values = tl.load(rows_ptr + column[:, None, :], mask, other=0.0, eviction_policy="evict_first")
        part = tl.sum(values.to(tl.float32) * x, 2)
        if GROUPS > 1:
            first = start + run
            some = ((first < K) | (K % BLOCK_K == 0))[:, None] & inside[None, :]
            group = per_group(row[None, :], (first // GROUP)[:, None], outputs, GROUPS, 0)
            part *= tl.load(scales_ptr + group, some, other=0.0).to(tl.float32)
        sums += part
    y = tl.sum(sums, 0)
    if GROUPS == 1:
        y *= tl.load(scales_ptr + row, inside, other=0.0).to(tl.float32)
    _store(y, row, inside, bias_ptr, out_ptr, N, BLOCK_N, HAS_BIAS, GATED)


@triton.jit
def _store(
    y,
    row,
    inside,
    bias_ptr,
    out_ptr,
    N,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
):
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, inside, other=0.0).to(tl.float32)
    if GATED:
        gate, up = tl.split(tl.reshape(y, (BLOCK_N // 2, 2)))
        output = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        tl.store(out_ptr + output, silu(gate) * up, output < N)
    else:
        tl.store(out_ptr + row, y, inside)


def packed_product_torch(
    x: torch.Tensor,
    matrix: PackedMatrix,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    silu_mul: bool = False,
) -> torch.Tensor:
    """The plain twin of every product with a packed matrix, for any number of rows."""
    weight = dequantize_torch(matrix, torch.float32)
    y = F.linear(x.float(), weight, None if bias is None else bias.float())
    if silu_mul:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return out.copy_(y)
