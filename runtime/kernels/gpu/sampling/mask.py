"""Token masks: what a request's grammar rules out. The plain twin is `runtime.kernels.token_mask`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.kernels.gpu.language import tl, triton
from runtime.kernels.gpu.launch import kernel


@dataclass(frozen=True, slots=True)
class RowMasks:
    """Masks of some of a batch's rows.

    rows  [N] int32, the row that each mask is for
    bits  [N, W] int32, one bit a token, the lowest of the first word for token 0; W * 32 >= vocab_size
    """

    rows: torch.Tensor
    bits: torch.Tensor


@kernel
@triton.jit(do_not_specialize=["bits_stride"], do_not_specialize_on_alignment=["rows_ptr"])
def mask_kernel(
    logits_ptr,
    stride,
    rows_ptr,
    bits_ptr,
    bits_stride,
    vocab_size,
    CHUNK: tl.constexpr,
):
    """Grid (chunks, masks): in float32 logits, -inf for the tokens whose bits are clear."""
    chunk, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.load(rows_ptr + index).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < vocab_size
    word = tl.load(bits_ptr + index * bits_stride + token // 32, inside, other=-1)
    ruled_out = inside & (((word >> (token % 32)) & 1) == 0)
    tl.store(logits_ptr + row * stride + token, tl.full((CHUNK,), float("-inf"), tl.float32), ruled_out)
