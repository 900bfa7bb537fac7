"""Penalties, biases and banned tokens: what changes logits before a token is chosen."""

from __future__ import annotations

import torch

from runtime.kernels.gpu.language import tl, triton
from runtime.kernels.gpu.launch import kernel
from runtime.kernels.gpu.sampling.parameters import (
    ADJUSTED,
    COUNTED,
    FLAGS,
    FREQUENCY,
    MIN_LENGTH,
    NUM_BIASES,
    NUM_STOPS,
    PRESENCE,
    REPETITION,
)
from runtime.kernels.gpu.sampling.scan import parameter, parameter_float
from runtime.protocol import MAX_BIASES, MAX_STOPS, SamplingParams

_BIASES = tl.constexpr(MAX_BIASES)
_STOPS = tl.constexpr(MAX_STOPS)


@triton.jit
def penalise(x, count, repetition, presence, frequency):
    """The repetition penalty (Keskar et al., 2019) counts prompt and output, as transformers does; the
    presence and frequency penalties count the output only, as OpenAI's API documents them."""
    x = tl.where(count != 0, tl.where(x > 0, x / repetition, x * repetition), x)
    generated = count & 0x7FFFFFFF
    return x - (generated.to(tl.float32) * frequency + tl.where(generated > 0, presence, 0.0))


@kernel
@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "lengths_ptr"])
def adjust_kernel(
    logits_ptr,
    stride,
    adjusted_ptr,
    adjusted_stride,
    records_ptr,
    bias_ids_ptr,
    bias_values_ptr,
    stop_ids_ptr,
    counts_ptr,
    rows_ptr,
    lengths_ptr,
    vocab_size,
    CHUNK: tl.constexpr,
):
    """Grid (chunks, rows): float32 copies, adjusted, of the rows that ask for it."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(rows_ptr + row).to(tl.int64)
    if slot >= 0:
        flags = parameter(records_ptr, slot, FLAGS)
        if (flags & ADJUSTED) != 0:
            token = chunk * CHUNK + tl.arange(0, CHUNK)
            mask = token < vocab_size
            out_ptr = adjusted_ptr + row * adjusted_stride
            x = tl.load(logits_ptr + row * stride + token, mask, other=0.0).to(tl.float32)
            if (flags & COUNTED) != 0:
                count = tl.load(counts_ptr + slot * vocab_size + token, mask, other=0)
                repetition = parameter_float(records_ptr, slot, REPETITION)
                presence = parameter_float(records_ptr, slot, PRESENCE)
                frequency = parameter_float(records_ptr, slot, FREQUENCY)
                x = penalise(x, count, repetition, presence, frequency)
            tl.store(out_ptr + token, x, mask)
            # Other threads of this program wrote what follows reads.
            tl.debug_barrier()
            index = tl.arange(0, _BIASES)
            listed = index < parameter(records_ptr, slot, NUM_BIASES)
            token = tl.load(bias_ids_ptr + slot * _BIASES + index, listed, other=-1)
            mine = listed & (token // CHUNK == chunk) & (token >= 0) & (token < vocab_size)
            bias = tl.load(bias_values_ptr + slot * _BIASES + index, mine, other=0.0)
            tl.store(out_ptr + token, tl.load(out_ptr + token, mine, other=0.0) + bias, mine)
            tl.debug_barrier()
            index = tl.arange(0, _STOPS)
            too_short = tl.load(lengths_ptr + row) < parameter(records_ptr, slot, MIN_LENGTH)
            listed = index < tl.where(too_short, parameter(records_ptr, slot, NUM_STOPS), 0)
            token = tl.load(stop_ids_ptr + slot * _STOPS + index, listed, other=-1)
            mine = listed & (token // CHUNK == chunk) & (token >= 0) & (token < vocab_size)
            tl.store(out_ptr + token, tl.full((_STOPS,), float("-inf"), tl.float32), mine)


def adjust_torch(
    logits: torch.Tensor, counts: torch.Tensor, sampling: SamplingParams, banned: bool
) -> torch.Tensor:
    """The plain twin, for one row: logits and counts [vocab_size] -> float32 logits, a copy."""
    x = logits.float()
    repetition = sampling.repetition_penalty
    x = torch.where(counts != 0, torch.where(x > 0, x / repetition, x * repetition), x)
    generated = counts & 0x7FFFFFFF
    x = x - (generated * sampling.frequency_penalty + (generated > 0) * sampling.presence_penalty)
    for token, bias in sampling.logit_bias.items():
        x[token] += bias
    if banned:
        x[list(sampling.stop_token_ids)] = -torch.inf
    return x
