"""How kernels read quantised weights: where a row's values are, and what turns them into floating point."""

from __future__ import annotations

import functools

import torch

from runtime.kernels.gpu.language import INTERPRETED, tl, triton
from runtime.kernels.packed import PackedMatrix


def word_shape(matrix: PackedMatrix) -> dict[str, int]:
    """How kernels step through the values: so many at a time as have one scale."""
    if matrix.bits:
        _, chunks, rows, field = matrix.values.shape
        return {"WORDS": chunks * field, "FIELD": field, "BITS": matrix.bits, "ROW_BLOCK": rows}
    whole = matrix.groups == 1 or matrix.group_size % 128 == 0
    field = 128 if whole else matrix.group_size
    return {"WORDS": matrix.in_features, "FIELD": field, "BITS": 0, "ROW_BLOCK": 1}


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The device's compute capability."""
    return torch.cuda.get_device_capability(device)


def has_instructions(x: torch.Tensor) -> bool:
    """Whether the device has those of `widening`; else plain arithmetic does the same."""
    if INTERPRETED:
        return False
    return x.dtype == torch.float16 or capability(x.device) >= (9, 0)


@functools.cache
def widening(bits: int, dtype: torch.dtype, scaled: bool) -> tuple[str, ...]:
    """For each field of words of 16 bits, instructions that turn two of them, $1, into two values, $0; these
    are multiplied by $2 if `scaled`.

    The bits are put into the last bits of a number whose exponent gives them the weight 1, from which the
    rest of that number is subtracted: in float16 1024 + n has n in its last 10 bits, in bfloat16 128 + n in
    its last 7. Bits that stand 4 further up count 16 times as much, which is undone while subtracting. Of 8
    bits in bfloat16 the first is counted apart: n - 128 is 128 + (the last 7) - (256 or 128). After Kim et
    al., "Who Says Elephants Can't Run", 2022.
    """
    half, and_or, and_xor = dtype == torch.float16, "0xea", "0x6a"
    if half and bits == 8:
        steps = [
            f"mov.b32 u, 0x64646464; prmt.b32 t, $1, u, {bytes_}; mov.b32 u, 0x64806480; sub.f16x2 t, t, u;"
            for bytes_ in ("0x4240", "0x4341")
        ]
    elif half:
        low = f"lop3.b32 t, t, 0x000f000f, 0x64006400, {and_or}; mov.b32 u, 0x64086408; sub.f16x2 t, t, u;"
        high = (
            f"lop3.b32 t, t, 0x00f000f0, 0x64006400, {and_or}; "
            "mov.b32 u, 0x2c002c00; mov.b32 v, 0xd480d480; fma.rn.f16x2 t, t, u, v;"
        )
        steps = [f"shr.u32 t, $1, {shift}; {nibble}" for shift in (0, 8) for nibble in (low, high)]
    elif bits == 4:
        steps = [
            f"shr.u32 t, $1, {shift}; lop3.b32 t, t, 0x000f000f, 0x43004300, {and_or}; "
            "mov.b32 u, 0x43084308; sub.bf16x2 t, t, u;"
            for shift in (0, 4, 8, 12)
        ]
    else:
        steps = [
            f"shr.u32 t, $1, {shift}; lop3.b32 u, t, 0x00800080, 0x43804380, {and_xor}; "
            f"lop3.b32 t, t, 0x007f007f, 0x43004300, {and_or}; sub.bf16x2 t, t, u;"
            for shift in (0, 8)
        ]
    end = f"mul.{'f16x2' if half else 'bf16x2'} $0, t, $2;" if scaled else "mov.b32 $0, t;"
    return tuple(f"{{ .reg .b32 t, u, v; {each} {end} }}" for each in steps)


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
def row_start(row, WORDS: tl.constexpr, FIELD: tl.constexpr, ROW_BLOCK: tl.constexpr):
    """Where the first chunk of a row of WORDS values is; the next is ROW_BLOCK * FIELD further on."""
    return (row // ROW_BLOCK).to(tl.int64) * (ROW_BLOCK * WORDS) + (row % ROW_BLOCK) * FIELD


@triton.jit
def per_group(row, group, outputs, GROUPS: tl.constexpr, BITS: tl.constexpr):
    """Where the scale, or the zero, of a group of a row's inputs is; see `packed.in_order`."""
    return group * outputs + row if BITS == 4 else row * GROUPS + group


@triton.jit
def widened(words, scale, x, BITS: tl.constexpr, FIELD_INDEX: tl.constexpr, WIDENING: tl.constexpr):
    """The values in the i-th bits of each word, or of e4m3, in x's dtype, times `scale` if there is one."""
    if WIDENING is None:
        if BITS == 0:
            # By way of float32, which GPUs are much quicker at than at half to bfloat16.
            values = words.to(tl.float32).to(x.dtype)
        else:
            values = integers_of(words, BITS, FIELD_INDEX, x.dtype)
        if scale is not None:
            values *= scale.to(x.dtype)
    elif scale is None:
        values = _widen_pairs([words], "=r,r", x, WIDENING, FIELD_INDEX)
    else:
        values = _widen_pairs([words, scale.to(x.dtype)], "=r,r,r", x, WIDENING, FIELD_INDEX)
    return values


@triton.jit
def integers_of(words, BITS: tl.constexpr, FIELD_INDEX: tl.constexpr, DTYPE: tl.constexpr):
    """The values in the i-th bits of each word."""
    integers = (words >> (BITS * FIELD_INDEX)) & ((1 << BITS) - 1)
    return (integers - (1 << (BITS - 1))).to(DTYPE)


@triton.jit
def _widen_pairs(operands, CONSTRAINTS: tl.constexpr, x, WIDENING: tl.constexpr, FIELD_INDEX: tl.constexpr):
    """What `integers_of` does, two words at a time; see `widening`."""
    return tl.inline_asm_elementwise(
        WIDENING[FIELD_INDEX], CONSTRAINTS, operands, dtype=x.dtype, is_pure=True, pack=2
    )
