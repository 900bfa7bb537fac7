"""The end of the search for a cut: the tokens left in the interval are gathered, and one program a row
finds the threshold among them.

After the passes of `threshold.py` few tokens are left: they are written side by side, in whatever order,
and halving the interval over them takes no more reading. Where more are left than there is room for (many
logits are equal, say), the program halves it over the whole row instead, which is slow but as exact.
"""

from __future__ import annotations

from runtime.kernels.gpu.language import tl, triton
from runtime.kernels.gpu.launch import kernel
from runtime.kernels.gpu.sampling.parameters import TEMPERATURE
from runtime.kernels.gpu.sampling.scan import load_logits, parameter_float, row_best
from runtime.kernels.gpu.sampling.threshold import (
    UNIT,
    distance_bits,
    is_cut,
    narrow,
    probability,
    target_weight,
)

_NO_BITS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def weight_within(bits, low, end, temperature, BY_COUNT: tl.constexpr):
    """The weight of those bits that lie in (low, end], int64; see `threshold.py`."""
    inside = (bits > low) & (bits <= end)
    if BY_COUNT:
        total = tl.sum(inside.to(tl.int32), 0).to(tl.int64)
    else:
        total = tl.sum(tl.where(inside, probability(bits, temperature) * UNIT, 0.0).to(tl.int64), 0)
    return total


@kernel
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["rows_ptr"])
def collect_kernel(
    logits_ptr,
    stride,
    adjusted_ptr,
    adjusted_stride,
    records_ptr,
    rows_ptr,
    best_logit_ptr,
    mass_ptr,
    interval_ptr,
    buckets_ptr,
    found_ptr,
    candidates_ptr,
    num_rows,
    vocab_size,
    PASSES: tl.constexpr,
    CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ADJUST: tl.constexpr,
    BY_COUNT: tl.constexpr,
):
    """Grid (chunks, rows): the bits of the distances left in the interval, as far as there is room."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_chunks = tl.num_programs(0)
    slot = tl.load(rows_ptr + row).to(tl.int64)
    if slot >= 0:
        if is_cut(records_ptr, slot, vocab_size, BY_COUNT):
            temperature = parameter_float(records_ptr, slot, TEMPERATURE)
            target = target_weight(records_ptr, slot, mass_ptr, row, num_chunks, CHUNKS, BY_COUNT)
            low, high, _, weights = narrow(
                interval_ptr, buckets_ptr, num_rows, row, num_chunks, PASSES, target, temperature, CHUNKS
            )
            if tl.sum(tl.where(tl.arange(0, CHUNKS) == chunk, weights, 0), 0) > 0:
                token = chunk * CHUNK + tl.arange(0, CHUNK)
                mask = token < vocab_size
                x = load_logits(
                    logits_ptr, stride, adjusted_ptr, adjusted_stride, records_ptr, row, slot, token, mask,
                    ADJUST,
                )  # fmt: skip
                bits = distance_bits(x, row_best(best_logit_ptr, row, num_chunks, CHUNKS))
                inside = (mask & (bits > low) & (bits <= high)).to(tl.int32)
                first = tl.atomic_add(found_ptr + row, tl.sum(inside, 0))
                place = first + tl.cumsum(inside, 0) - inside
                room = (inside != 0) & (place < CAPACITY)
                tl.store(candidates_ptr + row * CAPACITY + place, bits, room)


@kernel
@triton.jit(do_not_specialize=["num_rows", "num_chunks"], do_not_specialize_on_alignment=["rows_ptr"])
def settle_kernel(
    logits_ptr,
    stride,
    adjusted_ptr,
    adjusted_stride,
    records_ptr,
    rows_ptr,
    best_logit_ptr,
    mass_ptr,
    threshold_ptr,
    interval_ptr,
    buckets_ptr,
    found_ptr,
    candidates_ptr,
    num_rows,
    num_chunks,
    vocab_size,
    PASSES: tl.constexpr,
    CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ADJUST: tl.constexpr,
    BY_COUNT: tl.constexpr,
):
    """Grid (rows): the row's threshold."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(rows_ptr + row).to(tl.int64)
    if slot >= 0:
        if is_cut(records_ptr, slot, vocab_size, BY_COUNT):
            temperature = parameter_float(records_ptr, slot, TEMPERATURE)
            target = target_weight(records_ptr, slot, mass_ptr, row, num_chunks, CHUNKS, BY_COUNT)
            low, high, below, _ = narrow(
                interval_ptr, buckets_ptr, num_rows, row, num_chunks, PASSES, target, temperature, CHUNKS
            )
            found = tl.load(found_ptr + row)
            place = tl.arange(0, CAPACITY)
            candidates = tl.load(candidates_ptr + row * CAPACITY + place, place < found, other=_NO_BITS)
            best = row_best(best_logit_ptr, row, num_chunks, CHUNKS)
            while high - low > 1:
                middle = low + (high - low) // 2
                if found <= CAPACITY:
                    weight = weight_within(candidates, low, middle, temperature, BY_COUNT)
                else:
                    weight = tl.full((), 0, tl.int64)
                    for chunk in range(num_chunks):
                        token = chunk * CHUNK + tl.arange(0, CHUNK)
                        x = load_logits(
                            logits_ptr, stride, adjusted_ptr, adjusted_stride, records_ptr, row, slot, token,
                            token < vocab_size, ADJUST,
                        )  # fmt: skip
                        bits = tl.where(token < vocab_size, distance_bits(x, best), _NO_BITS)
                        weight += weight_within(bits, low, middle, temperature, BY_COUNT)
                if below + weight >= target:
                    high = middle
                else:
                    below += weight
                    low = middle
            tl.store(threshold_ptr + row, high.to(tl.int32))
            tl.store(found_ptr + row, 0)
