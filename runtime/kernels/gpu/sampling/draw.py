"""One token of those that are left, by inverting the cumulative distribution in the vocabulary's order."""

from __future__ import annotations

import torch

from runtime.kernels.gpu.language import tl, triton
from runtime.kernels.gpu.launch import kernel
from runtime.kernels.gpu.prepare import advance
from runtime.kernels.gpu.sampling.parameters import COUNTED, FLAGS, MIN_P, SEED, TEMPERATURE, WORDS
from runtime.kernels.gpu.sampling.scan import (
    load_logits,
    parameter,
    parameter_float,
    row_best,
    row_best_token,
)
from runtime.kernels.gpu.sampling.threshold import (
    UNIT,
    distance_bits,
    probability,
    probability_torch,
)


@triton.jit
def uniform_bits(seed, position):
    """A uniform number in [0, 1) for one token of one request, as its 53 bits in the top of a uint64.

    SplitMix64 (Steele et al., 2014) as a hash: the same number as the CPU's sampler draws.
    """
    z = seed + (position.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return (z ^ (z >> 31)) >> 11 << 11


@triton.jit
def load_seed(records_ptr, slot):
    """A slot's seed, uint64."""
    low = tl.load(records_ptr + slot * WORDS + SEED).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(records_ptr + slot * WORDS + SEED + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    return (high << 32) | low


@triton.jit
def masses(x, best, threshold, min_p, temperature, mask):
    """Probabilities in UNITs, int64; zero for tokens that are cut off."""
    bits = distance_bits(x, best)
    relative = probability(bits, temperature)
    kept = mask & (bits <= threshold) & (relative >= min_p)
    return tl.where(kept, relative * UNIT, 0.0).to(tl.int64)


@kernel
@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def weigh_kernel(
    logits_ptr,
    stride,
    adjusted_ptr,
    adjusted_stride,
    records_ptr,
    rows_ptr,
    best_logit_ptr,
    threshold_ptr,
    mass_ptr,
    vocab_size,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ADJUST: tl.constexpr,
    USE_MIN_P: tl.constexpr,
):
    """Grid (chunks, rows): the mass of each chunk's tokens within the threshold."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_chunks = tl.num_programs(0)
    slot = tl.load(rows_ptr + row).to(tl.int64)
    if slot >= 0:
        temperature = parameter_float(records_ptr, slot, TEMPERATURE)
        if temperature > 0:
            token = chunk * CHUNK + tl.arange(0, CHUNK)
            mask = token < vocab_size
            x = load_logits(
                logits_ptr, stride, adjusted_ptr, adjusted_stride, records_ptr, row, slot, token, mask, ADJUST
            )
            best = row_best(best_logit_ptr, row, num_chunks, CHUNKS)
            min_p = parameter_float(records_ptr, slot, MIN_P) if USE_MIN_P else 0.0
            mass = masses(x, best, tl.load(threshold_ptr + row), min_p, temperature, mask)
            tl.store(mass_ptr + row * num_chunks + chunk, tl.sum(mass, 0))


@triton.jit
def find(mass, wanted):
    """How many leading entries' masses add up to no more than `wanted`: the entry where it falls."""
    return tl.sum((tl.cumsum(mass, 0) <= wanted).to(tl.int32), 0)


@kernel
@triton.jit(
    do_not_specialize=["num_chunks"],
    do_not_specialize_on_alignment=["rows_ptr", "lengths_ptr", "tokens_ptr"],
)
def pick_kernel(
    logits_ptr,
    stride,
    adjusted_ptr,
    adjusted_stride,
    records_ptr,
    counts_ptr,
    rows_ptr,
    lengths_ptr,
    best_logit_ptr,
    best_token_ptr,
    threshold_ptr,
    mass_ptr,
    tokens_ptr,
    last_token_ptr,
    seq_len_ptr,
    num_chunks,
    vocab_size,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ADJUST: tl.constexpr,
    DRAW: tl.constexpr,
):
    """Grid (rows): the row's token, and the request's state moved on to it."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(rows_ptr + row).to(tl.int64)
    if slot >= 0:
        length = tl.load(lengths_ptr + row)
        token = row_best_token(best_logit_ptr, best_token_ptr, row, num_chunks, CHUNKS)
        if DRAW:
            temperature = parameter_float(records_ptr, slot, TEMPERATURE)
            if temperature > 0:
                chunk_index = tl.arange(0, CHUNKS)
                mass = tl.load(mass_ptr + row * num_chunks + chunk_index, chunk_index < num_chunks, other=0)
                total = tl.sum(mass, 0)
                uniform = uniform_bits(load_seed(records_ptr, slot), length)
                wanted = tl.umulhi(uniform, total.to(tl.uint64)).to(tl.int64)
                chunk = tl.minimum(find(mass, wanted), num_chunks - 1)
                wanted -= tl.sum(tl.where(chunk_index < chunk, mass, 0), 0)
                inner = tl.arange(0, CHUNK)
                candidates = chunk * CHUNK + inner
                mask = candidates < vocab_size
                x = load_logits(
                    logits_ptr, stride, adjusted_ptr, adjusted_stride, records_ptr, row, slot, candidates,
                    mask, ADJUST,
                )  # fmt: skip
                best = row_best(best_logit_ptr, row, num_chunks, CHUNKS)
                min_p = parameter_float(records_ptr, slot, MIN_P)
                mass = masses(x, best, tl.load(threshold_ptr + row), min_p, temperature, mask)
                token = chunk * CHUNK + find(mass, wanted)
        token = tl.minimum(token, vocab_size - 1)
        tl.store(tokens_ptr + row, token)
        advance(slot, token, length, last_token_ptr, seq_len_ptr)
        if ADJUST:
            if (parameter(records_ptr, slot, FLAGS) & COUNTED) != 0:
                cell = counts_ptr + slot * vocab_size + token
                tl.store(cell, tl.load(cell) + 1)


def masses_torch(distance: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities relative to the likeliest token's in units of 2^-40: [vocab_size] int64."""
    units: float = UNIT.value
    return (probability_torch(distance, temperature) * units).long()


def draw_torch(mass: torch.Tensor, uniform: int) -> int:
    """The plain twin, for one row: masses [vocab_size] int64 of the tokens left, and 64 uniform bits."""
    cumulative = mass.cumsum(0)
    wanted = uniform * int(cumulative[-1]) >> 64
    return int((cumulative <= wanted).sum())
