"""The largest logit of each chunk of a row, where it is, and the smallest one."""

from __future__ import annotations

import torch

from runtime.kernels.gpu.language import tl, triton
from runtime.kernels.gpu.launch import kernel
from runtime.kernels.gpu.sampling.parameters import ADJUSTED, FLAGS, WORDS

# The bits of positive infinity. Non-negative floats are ordered as their bits are.
INFINITY_BITS = tl.constexpr(0x7F800000)
_NO_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def parameter(records_ptr, slot, FIELD: tl.constexpr):
    """One word of a slot's record, an integer."""
    return tl.load(records_ptr + slot * WORDS + FIELD)


@triton.jit
def parameter_float(records_ptr, slot, FIELD: tl.constexpr):
    """One word of a slot's record, a float."""
    return tl.load(records_ptr + slot * WORDS + FIELD).to(tl.float32, bitcast=True)


@triton.jit
def load_logits(
    logits_ptr,
    stride,
    adjusted_ptr,
    adjusted_stride,
    records_ptr,
    row,
    slot,
    token,
    mask,
    ADJUST: tl.constexpr,
):
    """A row's logits for `token`, float32, adjusted where the request asks for that; -inf where masked."""
    if ADJUST:
        if (parameter(records_ptr, slot, FLAGS) & ADJUSTED) != 0:
            x = tl.load(adjusted_ptr + row * adjusted_stride + token, mask, other=float("-inf"))
        else:
            x = tl.load(logits_ptr + row * stride + token, mask, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(logits_ptr + row * stride + token, mask, other=float("-inf")).to(tl.float32)
    return x


@triton.jit
def row_best(best_logit_ptr, row, num_chunks, CHUNKS: tl.constexpr):
    """The largest logit of a row, from those of its chunks."""
    chunk = tl.arange(0, CHUNKS)
    best = tl.load(best_logit_ptr + row * num_chunks + chunk, chunk < num_chunks, other=float("-inf"))
    return tl.max(best, 0)


@triton.jit
def row_worst(worst_logit_ptr, row, num_chunks, CHUNKS: tl.constexpr):
    """The smallest logit of a row that is not minus infinity; plus infinity if there is none."""
    chunk = tl.arange(0, CHUNKS)
    worst = tl.load(worst_logit_ptr + row * num_chunks + chunk, chunk < num_chunks, other=float("inf"))
    return tl.min(worst, 0)


@triton.jit
def row_best_token(best_logit_ptr, best_token_ptr, row, num_chunks, CHUNKS: tl.constexpr):
    """The token of a row's largest logit: of several the lowest id, as argmax has it."""
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < num_chunks
    best = tl.load(best_logit_ptr + row * num_chunks + chunk, inside, other=float("-inf"))
    token = tl.load(best_token_ptr + row * num_chunks + chunk, inside, other=_NO_TOKEN)
    return tl.min(tl.where(best == tl.max(best, 0), token, _NO_TOKEN), 0)


@kernel
@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def scan_kernel(
    logits_ptr,
    stride,
    adjusted_ptr,
    adjusted_stride,
    records_ptr,
    rows_ptr,
    best_logit_ptr,
    best_token_ptr,
    worst_logit_ptr,
    threshold_ptr,
    vocab_size,
    CHUNK: tl.constexpr,
    ADJUST: tl.constexpr,
):
    """Grid (chunks, rows). Also opens the row's threshold to every token."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(rows_ptr + row).to(tl.int64)
    if slot >= 0:
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        mask = token < vocab_size
        x = load_logits(
            logits_ptr, stride, adjusted_ptr, adjusted_stride, records_ptr, row, slot, token, mask, ADJUST
        )
        best = tl.max(x, 0)
        cell = row * tl.num_programs(0) + chunk
        tl.store(best_logit_ptr + cell, best)
        tl.store(best_token_ptr + cell, tl.min(tl.where(x == best, token, _NO_TOKEN), 0))
        # What is ruled out altogether is not among them.
        tl.store(worst_logit_ptr + cell, tl.min(tl.where(x > float("-inf"), x, float("inf")), 0))
        if chunk == 0:
            tl.store(threshold_ptr + row, INFINITY_BITS)


def best_torch(logits: torch.Tensor) -> int:
    """The plain twin, for one row [vocab_size]: the lowest of the tokens with the largest logit."""
    return int((logits == logits.max()).nonzero()[0])
