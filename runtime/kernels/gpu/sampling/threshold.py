"""Where top-k and top-p cut: the largest distance from the row's best logit that a kept token may have.

Both ask for the smallest t such that the tokens no further than t from the best weigh enough: top-k
counts them, top-p adds up their probabilities. The bits of the float32 distance are searched, as
non-negative floats are ordered as their bits are: each pass cuts an interval into BUCKETS parts, weighs
the tokens in each, and the next pass goes on in the part where the target is reached. After PASSES of
them few tokens are left, among which `settle.py` finds the exact answer. Tokens that tie with the last one
kept are kept.
"""

from __future__ import annotations

import torch

from runtime.kernels.gpu.language import tl, triton
from runtime.kernels.gpu.launch import kernel
from runtime.kernels.gpu.sampling.parameters import TEMPERATURE, TOP_K, TOP_P
from runtime.kernels.gpu.sampling.scan import (
    load_logits,
    parameter,
    parameter_float,
    row_best,
    row_worst,
)

BUCKETS = tl.constexpr(8)
# The first pass cuts where thresholds are likely. After two more, a part of 128k normally distributed
# logits holds about 500 of them.
PASSES = 3
_LN_2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(1.4426950408889634)
# A probability as a whole number of 2^-40 of the likeliest token's: sums do not depend on their order.
UNIT = tl.constexpr(float(1 << 40))
_NAN_BITS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def distance_bits(x, best):
    """How far logits are from the best one, as the bits of a float32; what is no number is furthest."""
    distance = tl.where(x == best, 0.0, best - x)
    return tl.where(distance >= 0, distance.to(tl.int32, bitcast=True), _NAN_BITS)


@triton.jit
def probability(bits, temperature):
    """exp(-distance / temperature): the probability, relative to the likeliest token's."""
    return tl.exp2(bits.to(tl.float32, bitcast=True) * (-_LOG2_E / temperature))


def probability_torch(distance: torch.Tensor, temperature: float) -> torch.Tensor:
    """The plain twin of `probability`, of float32 distances."""
    return torch.exp2(distance * (-_LOG2_E.value / torch.tensor(temperature, device=distance.device)))


@triton.jit
def is_cut(records_ptr, slot, vocab_size, BY_COUNT: tl.constexpr):
    """Whether the row's request uses top-k (BY_COUNT) or top-p. Greedy ones use neither."""
    if BY_COUNT:
        top_k = parameter(records_ptr, slot, TOP_K)
        asked = (top_k > 0) & (top_k < vocab_size)
    else:
        asked = parameter_float(records_ptr, slot, TOP_P) < 1.0
    return asked & (parameter_float(records_ptr, slot, TEMPERATURE) > 0)


@triton.jit
def target_weight(records_ptr, slot, mass_ptr, row, num_chunks, CHUNKS: tl.constexpr, BY_COUNT: tl.constexpr):
    """The weight that the tokens kept must reach, int64; mass_ptr holds the chunks' weights for top-p."""
    if BY_COUNT:
        target = parameter(records_ptr, slot, TOP_K).to(tl.int64)
    else:
        chunk = tl.arange(0, CHUNKS)
        mass = tl.sum(tl.load(mass_ptr + row * num_chunks + chunk, chunk < num_chunks, other=0), 0)
        share = parameter_float(records_ptr, slot, TOP_P).to(tl.float64) * mass.to(tl.float64)
        target = share.to(tl.int64)
        target = tl.maximum(target + (target.to(tl.float64) < share).to(tl.int64), 1)
    return target


@triton.jit
def edge(low, high, index, first_pass, temperature):
    """Where part `index` of the interval (low, high] begins, for index from 0 to BUCKETS.

    The first pass puts the edges between at probabilities of 2^-0.25, 2^-0.5, 2^-1 … 2^-16.
    """
    octaves = (temperature * _LN_2).to(tl.int32, bitcast=True).to(tl.int64) + ((index - 3) << 23)
    even = low + (high - low) * index // BUCKETS
    inner = tl.minimum(tl.maximum(tl.where(first_pass, octaves, even), low), high)
    return tl.where(index == 0, low, tl.where(index == BUCKETS, high, inner))


@triton.jit
def narrow(
    interval_ptr, buckets_ptr, num_rows, row, num_chunks, done, target, temperature, CHUNKS: tl.constexpr
):
    """After `done` passes: the interval (low, high] where the target is reached, the weight of what lies
    below it, and the weights of the row's chunks inside it [CHUNKS]."""
    place = ((done - 1) % 2) * num_rows + row
    low = tl.load(interval_ptr + place * 3)
    high = tl.load(interval_ptr + place * 3 + 1)
    below = tl.load(interval_ptr + place * 3 + 2)
    chunk = tl.arange(0, CHUNKS)[:, None]
    index = tl.arange(0, BUCKETS)[None, :]
    weights = tl.load(
        buckets_ptr + (place * num_chunks + chunk) * BUCKETS + index, chunk < num_chunks, other=0
    )
    totals = tl.sum(weights, 0)
    reached = below + tl.cumsum(totals, 0) >= target
    chosen = tl.minimum(tl.sum((~reached).to(tl.int32), 0), BUCKETS - 1)
    below += tl.sum(tl.where(tl.arange(0, BUCKETS) < chosen, totals, 0), 0)
    inside = tl.sum(tl.where(index == chosen, weights, 0), 1)
    chosen = chosen.to(tl.int64)
    first_pass = done == 1
    new_low = edge(low, high, chosen, first_pass, temperature)
    return new_low, edge(low, high, chosen + 1, first_pass, temperature), below, inside


@kernel
@triton.jit(do_not_specialize=["done", "num_rows"], do_not_specialize_on_alignment=["rows_ptr"])
def narrow_kernel(
    logits_ptr,
    stride,
    adjusted_ptr,
    adjusted_stride,
    records_ptr,
    rows_ptr,
    best_logit_ptr,
    worst_logit_ptr,
    mass_ptr,
    threshold_ptr,
    interval_ptr,
    buckets_ptr,
    done,
    num_rows,
    vocab_size,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ADJUST: tl.constexpr,
    BY_COUNT: tl.constexpr,
):
    """Grid (chunks, rows): one pass, after `done` others. What a pass writes it never reads: it takes
    turns between the two halves of interval and buckets."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_chunks = tl.num_programs(0)
    slot = tl.load(rows_ptr + row).to(tl.int64)
    if slot >= 0:
        if is_cut(records_ptr, slot, vocab_size, BY_COUNT):
            temperature = parameter_float(records_ptr, slot, TEMPERATURE)
            low = tl.full((), -1, tl.int64)
            best = row_best(best_logit_ptr, row, num_chunks, CHUNKS)
            # Nothing that counts lies beyond the row's last token: a cut in its tail is soon found.
            last = distance_bits(row_worst(worst_logit_ptr, row, num_chunks, CHUNKS), best)
            high = tl.minimum(tl.load(threshold_ptr + row), last).to(tl.int64)
            below = tl.full((), 0, tl.int64)
            mine = tl.full((), 1, tl.int64)
            if done > 0:
                target = target_weight(records_ptr, slot, mass_ptr, row, num_chunks, CHUNKS, BY_COUNT)
                low, high, below, weights = narrow(
                    interval_ptr, buckets_ptr, num_rows, row, num_chunks, done, target, temperature, CHUNKS
                )
                mine = tl.sum(tl.where(tl.arange(0, CHUNKS) == chunk, weights, 0), 0)
            place = (done % 2) * num_rows + row
            if chunk == 0:
                tl.store(interval_ptr + place * 3, low)
                tl.store(interval_ptr + place * 3 + 1, high)
                tl.store(interval_ptr + place * 3 + 2, below)
            out_ptr = buckets_ptr + (place * num_chunks + chunk) * BUCKETS
            if mine > 0:
                token = chunk * CHUNK + tl.arange(0, CHUNK)
                mask = token < vocab_size
                x = load_logits(
                    logits_ptr,
                    stride,
                    adjusted_ptr,
                    adjusted_stride,
                    records_ptr,
                    row,
                    slot,
                    token,
                    mask,
                    ADJUST,
                )
                bits = distance_bits(x, best)
                inside = mask & (bits > low) & (bits <= high)
                if BY_COUNT:
                    weight = inside.to(tl.int32)
                else:
                    weight = tl.where(inside, probability(bits, temperature) * UNIT, 0.0).to(tl.int64)
                before = tl.full((), 0, tl.int64)
                for index in range(BUCKETS):
                    end = edge(low, high, index + 1, done == 0, temperature)
                    upto = tl.sum(tl.where(bits <= end, weight, 0), 0).to(tl.int64)
                    tl.store(out_ptr + index, upto - before)
                    before = upto
            else:
                tl.store(out_ptr + tl.arange(0, BUCKETS), tl.full((BUCKETS,), 0, tl.int64))


def threshold_torch(distance: torch.Tensor, weight: torch.Tensor, target: int) -> torch.Tensor:
    """The plain twin, for one row: the smallest distance up to which weights reach the target.

    distance and weight are [vocab_size], weight int64; returns a scalar like distance.
    """
    distance, order = distance.sort()
    reached = weight[order].cumsum(0) >= target
    return distance[int(reached.nonzero()[0])] if bool(reached.any()) else distance[-1]
