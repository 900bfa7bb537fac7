"""Log probabilities under the model's own distribution, before temperature and all else."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.kernels.gpu.language import tl, triton
from runtime.kernels.gpu.launch import cdiv, kernel, next_power_of_2

_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural-log probabilities of R positions.

    chosen, ranks   [R]: each one's own token's, and how many tokens are likelier, plus one
    top_ids, top    [R, num_top]: the likeliest tokens and theirs, best first
    """

    chosen: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top: torch.Tensor


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, num_top: int, chunk: int = _CHUNK) -> Logprobs:
    """logits [R, vocab_size], tokens [R]: see `Logprobs`."""
    num_rows, vocab_size = logits.shape
    num_chunks = cdiv(vocab_size, chunk)
    best, weight = torch.empty((2, num_rows, num_chunks), device=logits.device)
    likelier = torch.empty((num_rows, num_chunks), device=logits.device, dtype=torch.int32)
    norm, chosen = torch.empty((2, num_rows), device=logits.device)
    ranks = torch.empty(num_rows, device=logits.device, dtype=torch.int32)
    _chunks_kernel[(num_chunks, num_rows)](
        logits, logits.stride(0), tokens, best, weight, likelier, vocab_size, CHUNK=chunk, num_warps=8
    )
    _rows_kernel[(num_rows,)](
        logits, logits.stride(0), tokens, best, weight, likelier, norm, chosen, ranks, num_chunks,
        CHUNKS=next_power_of_2(num_chunks), num_warps=1,
    )  # fmt: skip
    values, top_ids = logits.topk(num_top, dim=-1)
    return Logprobs(chosen, ranks, top_ids, values.float() - norm[:, None])


# `best` and `weight` share their memory, as `norm` and `chosen` do: where the second begins depends on R.
@kernel
@triton.jit(do_not_specialize_on_alignment=["tokens_ptr", "weight_ptr"])
def _chunks_kernel(
    logits_ptr, stride, tokens_ptr, best_ptr, weight_ptr, likelier_ptr, vocab_size, CHUNK: tl.constexpr
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * stride + token, token < vocab_size, other=float("-inf")).to(tl.float32)
    own = tl.load(logits_ptr + row * stride + tl.load(tokens_ptr + row)).to(tl.float32)
    best = tl.max(x, 0)
    cell = row * tl.num_programs(0) + chunk
    tl.store(best_ptr + cell, best)
    tl.store(weight_ptr + cell, tl.sum(tl.where(x == best, 1.0, tl.exp(x - best)), 0))
    tl.store(likelier_ptr + cell, tl.sum((x > own).to(tl.int32), 0))


@kernel
@triton.jit(
    do_not_specialize=["num_chunks"],
    do_not_specialize_on_alignment=["tokens_ptr", "weight_ptr", "chosen_ptr"],
)
def _rows_kernel(
    logits_ptr,
    stride,
    tokens_ptr,
    best_ptr,
    weight_ptr,
    likelier_ptr,
    norm_ptr,
    chosen_ptr,
    ranks_ptr,
    num_chunks,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < num_chunks
    cell = row * num_chunks + chunk
    chunk_best = tl.load(best_ptr + cell, inside, other=float("-inf"))
    weight = tl.load(weight_ptr + cell, inside, other=0.0)
    best = tl.max(chunk_best, 0)
    norm = best + tl.log(tl.sum(tl.where(weight > 0, weight * tl.exp(chunk_best - best), 0.0), 0))
    own = tl.load(logits_ptr + row * stride + tl.load(tokens_ptr + row)).to(tl.float32)
    tl.store(norm_ptr + row, norm)
    tl.store(chosen_ptr + row, own - norm)
    tl.store(ranks_ptr + row, tl.sum(tl.load(likelier_ptr + cell, inside, other=0), 0) + 1)


def token_logprobs_torch(logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> Logprobs:
    """The plain twin of `token_logprobs`."""
    logprobs = logits.float().log_softmax(dim=-1)
    chosen = logprobs.gather(1, tokens[:, None].long())
    top, top_ids = logprobs.topk(num_top, dim=-1)
    return Logprobs(chosen.squeeze(1), (logprobs > chosen).sum(dim=-1) + 1, top_ids, top)
