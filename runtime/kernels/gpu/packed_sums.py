"""The sums of a tile of a product with a quantised weight: two loops over the inputs.

Weights are scaled and then multiplied, or multiplied and their products scaled. The first rounds every weight
to the width of the rows, and keeps the tensor cores busy; the second is exact in float32.
"""

from __future__ import annotations

from runtime.kernels.gpu.language import tl, triton
from runtime.kernels.gpu.packed_words import per_group, widened


@triton.jit
def sums_of_scaled(
    x_ptr,
    values_ptr,
    scales_ptr,
    zeros_ptr,
    output,
    inside,
    wanted,
    first,
    last,
    outputs,
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
    HAS_ZEROS: tl.constexpr,
    WIDENING: tl.constexpr,
):
    """The sums of a tile, of weights that are scaled and then multiplied, all fields of STEP words at once.

    With one product a turn its sums are not waited for: while the tensor cores are at it, the next weights
    are widened.
    """
    FIELDS: tl.constexpr = 16 // BITS if BITS else 1
    STEPS: tl.constexpr = FIELD // STEP
    place = tl.arange(0, STEP)[None, :]
    index = tl.arange(0, FIELDS * STEP)
    # Inputs in the order in which their values stand in the words.
    inputs = ((index // STEP) * FIELD + index % STEP)[:, None]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    scales = _of_chunk(scales_ptr, output, inside, first, outputs, GROUP, GROUPS, FIELD, BITS, PER_SCALE)
    if HAS_ZEROS:
        zeros = _of_chunk(zeros_ptr, output, inside, first, outputs, GROUP, GROUPS, FIELD, BITS, PER_SCALE)
    else:
        zeros = ()
    for step in range(first * STEPS, last * STEPS):
        chunk, start = step // STEPS, (step % STEPS) * STEP
        now, zeros_now = scales, zeros
        # A turn ahead: nothing else that is waited for comes from so far away.
        ahead = (step + 1) // STEPS
        scales = _of_chunk(scales_ptr, output, inside, ahead, outputs, GROUP, GROUPS, FIELD, BITS, PER_SCALE)
        if HAS_ZEROS:
            zeros = _of_chunk(
                zeros_ptr, output, inside, ahead, outputs, GROUP, GROUPS, FIELD, BITS, PER_SCALE
            )
        within = (place + (chunk * FIELD + start) < WORDS) | (WORDS % FIELD == 0)
        word = chunk * (ROW_BLOCK * FIELD) + start + place
        words = tl.load(values_ptr + word, inside[:, None] & within, other=0.0, eviction_policy="evict_first")
        column = chunk * (FIELDS * FIELD) + start + inputs
        x = tl.load(x_ptr + column, wanted & ((column < K) | (K % (FIELDS * FIELD) == 0)), other=0.0)
        weight = _scaled(words, now, zeros_now, x, 0, GROUPS, BITS, PER_SCALE, HAS_ZEROS, WIDENING)
        if FIELDS > 1:
            second = _scaled(words, now, zeros_now, x, 1, GROUPS, BITS, PER_SCALE, HAS_ZEROS, WIDENING)
            weight = tl.join(weight, second)
        if FIELDS == 2:
            weight = tl.permute(weight, (0, 2, 1))
        elif FIELDS == 4:
            third = _scaled(words, now, zeros_now, x, 2, GROUPS, BITS, PER_SCALE, HAS_ZEROS, WIDENING)
            fourth = _scaled(words, now, zeros_now, x, 3, GROUPS, BITS, PER_SCALE, HAS_ZEROS, WIDENING)
            weight = tl.permute(tl.join(weight, tl.join(third, fourth)), (0, 3, 2, 1))
        sums = tl.dot(tl.reshape(weight, (BLOCK_N, FIELDS * STEP)), x, sums)
    return sums


@triton.jit
def _scaled(
    words,
    scales,
    zeros,
    x,
    FIELD_INDEX: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    PER_SCALE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    WIDENING: tl.constexpr,
):
    """The weights in the i-th bits of each word, but for a scale that all inputs share."""
    part: tl.constexpr = FIELD_INDEX // PER_SCALE
    scale = scales[part][:, None].to(x.dtype) if GROUPS > 1 else None
    if HAS_ZEROS:
        zero = zeros[part] if GROUPS > 1 else zeros[0]
        weight = widened(words, None, x, BITS, FIELD_INDEX, WIDENING) - zero[:, None].to(x.dtype)
        if GROUPS > 1:
            weight *= scale
    else:
        weight = widened(words, scale, x, BITS, FIELD_INDEX, WIDENING)
    return weight


@triton.jit
def scaled_sums(
    x_ptr,
    values_ptr,
    scales_ptr,
    zeros_ptr,
    output,
    inside,
    wanted,
    first,
    last,
    outputs,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    FIELD: tl.constexpr,
    BITS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    PER_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    WIDENING: tl.constexpr,
):
    """The sums of a tile, of products that are scaled, exact in float32."""
    FIELDS: tl.constexpr = 16 // BITS if BITS else 1
    place = tl.arange(0, FIELD)
    row, there = output[:, None], inside[:, None]
    x_ptr += place[:, None]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # Scales are loaded a chunk ahead: nothing else that is waited for comes from so far away.
    ahead = _of_chunk(scales_ptr, row, there, first, outputs, GROUP, GROUPS, FIELD, BITS, PER_SCALE)
    for chunk in range(first, last):
        scales = ahead
        ahead = _of_chunk(scales_ptr, row, there, chunk + 1, outputs, GROUP, GROUPS, FIELD, BITS, PER_SCALE)
        within = (place + chunk * FIELD < WORDS)[None, :] | (WORDS % FIELD == 0)
        word = chunk * (ROW_BLOCK * FIELD) + place[None, :]
        words = tl.load(values_ptr + word, there & within, other=0.0, eviction_policy="evict_first")
        for field in tl.static_range(FIELDS):
            start = (chunk * FIELDS + field) * FIELD
            known = (place + start < K)[:, None] | (K % (FIELDS * FIELD) == 0)
            x = tl.load(x_ptr + start, wanted & known, other=0.0)
            weight = widened(words, None, x, BITS, field, WIDENING)
            if HAS_ZEROS:
                group = per_group(row, tl.minimum(start // GROUP, GROUPS - 1), outputs, GROUPS, BITS)
                weight -= tl.load(zeros_ptr + group, there, other=0).to(x.dtype)
            if GROUPS == 1:
                sums = tl.dot(weight, x, sums)
            else:
                if field % PER_SCALE == 0:
                    part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                part = tl.dot(weight, x, part)
                if (field + 1) % PER_SCALE == 0:
                    sums += part * scales[field // PER_SCALE].to(tl.float32)
    return sums


@triton.jit
def _of_chunk(
    numbers_ptr,
    row,
    there,
    chunk,
    outputs,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    FIELD: tl.constexpr,
    BITS: tl.constexpr,
    PER_SCALE: tl.constexpr,
):
    """The scales, or the zeros, of each PER_SCALE fields of a chunk; past the last input the last ones."""
    FIELDS: tl.constexpr = 16 // BITS if BITS else 1
    first = chunk * FIELDS * FIELD
    step: tl.constexpr = PER_SCALE * FIELD
    parts: tl.constexpr = FIELDS // PER_SCALE if GROUPS > 1 else 1
    if parts == 1:
        return (_of_group(numbers_ptr, row, there, first, outputs, GROUP, GROUPS, BITS),)
    elif parts == 2:
        return (
            _of_group(numbers_ptr, row, there, first, outputs, GROUP, GROUPS, BITS),
            _of_group(numbers_ptr, row, there, first + step, outputs, GROUP, GROUPS, BITS),
        )
    else:
        return (
            _of_group(numbers_ptr, row, there, first, outputs, GROUP, GROUPS, BITS),
            _of_group(numbers_ptr, row, there, first + step, outputs, GROUP, GROUPS, BITS),
            _of_group(numbers_ptr, row, there, first + 2 * step, outputs, GROUP, GROUPS, BITS),
            _of_group(numbers_ptr, row, there, first + 3 * step, outputs, GROUP, GROUPS, BITS),
        )


@triton.jit
def _of_group(
    numbers_ptr, row, there, place, outputs, GROUP: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr
):
    group = tl.minimum(place // GROUP, GROUPS - 1)
    return tl.load(numbers_ptr + per_group(row, group, outputs, GROUPS, BITS), there, other=0)
