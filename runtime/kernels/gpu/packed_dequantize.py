"""Quantised weights back to floating point, for products of so many rows that the vendor's library pays."""

from __future__ import annotations

import torch

from runtime.kernels.gpu.language import tl, triton
from runtime.kernels.gpu.launch import cdiv, kernel
from runtime.kernels.gpu.packed_words import integers_of, per_group, row_start, word_shape
from runtime.kernels.packed import PackedMatrix

_BLOCK_N = 32


def dequantize(matrix: PackedMatrix, out: torch.Tensor) -> torch.Tensor:
    """Fill out [N, K], contiguous, of any floating type; returns it. The twin is `dequantize_torch`."""
    shape = word_shape(matrix)
    chunks = cdiv(shape["WORDS"], shape["FIELD"])
    _dequantize_kernel[(chunks, cdiv(matrix.out_features, _BLOCK_N))](
        matrix.values,
        matrix.scales,
        matrix.scales if matrix.zeros is None else matrix.zeros,
        out,
        matrix.out_features,
        K=matrix.in_features,
        GROUP=matrix.group_size,
        GROUPS=matrix.groups,
        BLOCK_N=_BLOCK_N,
        HAS_ZEROS=matrix.zeros is not None,
        num_warps=4,
        **shape,
    )
    return out


@kernel
@triton.jit
def _dequantize_kernel(
    values_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    N,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    FIELD: tl.constexpr,
    BITS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
):
    FIELDS: tl.constexpr = 16 // BITS if BITS else 1
    chunk = tl.program_id(0)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    place = tl.arange(0, FIELD)[None, :]
    there = output < N
    within = (place + chunk * FIELD < WORDS) | (WORDS % FIELD == 0)
    step: tl.constexpr = ROW_BLOCK * FIELD
    values_ptr += row_start(output, WORDS, FIELD, ROW_BLOCK) + chunk * step + place
    words = tl.load(values_ptr, there & within, other=0.0)
    for field in tl.static_range(FIELDS):
        start = (chunk * FIELDS + field) * FIELD
        values = integers_of(words, BITS, field, tl.float32) if BITS else words.to(tl.float32)
        group = per_group(output, tl.minimum(start // GROUP, GROUPS - 1), N, GROUPS, BITS)
        if HAS_ZEROS:
            values -= tl.load(zeros_ptr + group, there, other=0).to(tl.float32)
        values *= tl.load(scales_ptr + group, there, other=0.0).to(tl.float32)
        known = (place + start < K) | (K % (FIELDS * FIELD) == 0)
        tl.store(out_ptr + output.to(tl.int64) * K + start + place, values, there & known)
