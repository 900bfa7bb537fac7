"""The embedding of tokens: one row of a table for each."""

from __future__ import annotations

import torch

from runtime.kernels.gpu.early import begin, early_launch
from runtime.kernels.gpu.language import tl, triton
from runtime.kernels.gpu.launch import cdiv, kernel

_BLOCK = 1024


def embedding(
    token_ids: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, first_id: int = 0, scale: float = 1.0
) -> torch.Tensor:
    """token_ids [T] -> out [T, hidden_size]: the tokens' rows of weight, times scale.

    weight [rows, hidden_size] holds the ids from first_id on; an id outside gives zeros, so that with the
    table cut over several ranks the sum of theirs is the whole. Returns out.
    """
    num_tokens, hidden_size = out.shape
    _embedding_kernel[(num_tokens, cdiv(hidden_size, _BLOCK))](
        token_ids,
        weight,
        out,
        first_id,
        weight.shape[0],
        scale,
        HIDDEN_SIZE=hidden_size,
        BLOCK=_BLOCK,
        num_warps=4,
        **early_launch(),
    )
    return out


@kernel
@triton.jit(do_not_specialize=["first_id", "num_rows"], do_not_specialize_on_alignment=["token_ids_ptr"])
def _embedding_kernel(
    token_ids_ptr,
    weight_ptr,
    out_ptr,
    first_id,
    num_rows,
    scale,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < HIDDEN_SIZE
    row = tl.load(token_ids_ptr + token).to(tl.int64) - first_id
    width = tl.where((row >= 0) & (row < num_rows), HIDDEN_SIZE, 0)
    values = tl.load(weight_ptr + row * HIDDEN_SIZE + column, column < width, other=0.0)
    tl.store(out_ptr + token * HIDDEN_SIZE + column, values.to(tl.float32) * scale, mask)


def embedding_torch(
    token_ids: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, first_id: int = 0, scale: float = 1.0
) -> torch.Tensor:
    """The plain twin of `embedding`."""
    rows = token_ids.long() - first_id
    held = (rows >= 0) & (rows < weight.shape[0])
    return out.copy_(torch.where(held[:, None], weight[rows * held].float() * scale, 0.0))
