"""Products of few rows with a weight matrix, as decode steps of small batches need them.

The time is that of reading the weights once, so what counts is how many bytes are under way. One row is
multiplied by plain arithmetic, each program taking some rows of the weights whole. Up to MAX_ROWS rows are
padded to 16 and go through the tensor cores, the weights through a pipeline of tiles in shared memory. No
sum is split over programs: the result does not depend on who comes first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from runtime.kernels.gpu.activation import gelu_tanh, silu
from runtime.kernels.gpu.all_reduce import send
from runtime.kernels.gpu.early import begin, can_start_early, early_launch, let_next_start, wait
from runtime.kernels.gpu.inboxes import Inboxes
from runtime.kernels.gpu.language import tl, triton
from runtime.kernels.gpu.launch import cdiv, kernel

MAX_ROWS = 16
_PADDED_ROWS = tl.constexpr(16)


@dataclass(frozen=True, slots=True)
class GemvConfig:
    """How a product is cut up: block_n outputs a program, block_k inputs at a time."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# The fastest on an H200 for most of Llama-3-8B: `scripts/bench/kernels.py --only products --sweep`.
_ONE_ROW = GemvConfig(2, 2048, 4, 1)
# Which reads two rows of the weights for every output.
_ONE_GATED_ROW = GemvConfig(1, 2048, 4, 1)
_FEW_ROWS = GemvConfig(32, 128, 4, 6)
# (outputs of the weight, inputs, one row or several) where the sweep found something better.
_CONFIGS = {
    (128256, 4096, True): GemvConfig(1, 2048, 4, 1),
    (6144, 4096, False): GemvConfig(64, 128, 4, 5),
    (28672, 4096, False): GemvConfig(64, 128, 4, 4),
    (128256, 4096, False): GemvConfig(64, 128, 4, 4),
    # Llama-3-70B on four H200s: one row has all its weights on the way before x is there.
    (2560, 8192, True): GemvConfig(1, 8192, 4, 1),
    (8192, 2048, True): GemvConfig(2, 2048, 4, 1),
    (14336, 8192, True): GemvConfig(1, 8192, 4, 1),
    (8192, 7168, True): GemvConfig(1, 8192, 4, 1),
    (8192, 2048, False): GemvConfig(64, 128, 4, 6),
    (14336, 8192, False): GemvConfig(64, 128, 4, 4),
    (8192, 7168, False): GemvConfig(64, 128, 4, 6),
}


# Where products start early, one row has all its weights on the way before x is there, if they are not many;
# and large programs of several rows are faster, if there are enough of them. Measured in decode steps of
# Llama-3-8B, Gemma-2-9B and Yi-6B on an H200.
_WHOLE_INPUTS = range(2049, 4097)
_WHOLE_ROW = GemvConfig(1, 4096, 4, 1)
_WHOLE_GATED_ROW = GemvConfig(1, 4096, 8, 1)
_LARGE_OUTPUTS, _LARGEST_OUTPUTS = 3584, 20000
_LARGE = GemvConfig(64, 128, 4, 5)
_LARGEST = GemvConfig(64, 128, 4, 4)


def gemv_config(out_features: int, in_features: int, num_rows: int, gated: bool = False) -> GemvConfig:
    """The way of computing products with weights [out_features, in_features]."""
    single = num_rows == 1
    if can_start_early():
        if single and in_features in _WHOLE_INPUTS:
            return _WHOLE_GATED_ROW if gated else _WHOLE_ROW
        usual = _LARGEST if gated or out_features >= _LARGEST_OUTPUTS else _LARGE
        if not single and out_features >= _LARGE_OUTPUTS:
            return _CONFIGS.get((out_features, in_features, single), usual)
    usual = (_ONE_GATED_ROW if gated else _ONE_ROW) if single else _FEW_ROWS
    return _CONFIGS.get((out_features, in_features, single), usual)


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    silu_mul: bool = False,
    gelu_tanh_mul: bool = False,
    config: GemvConfig | None = None,
    inboxes: Inboxes | None = None,
) -> torch.Tensor:
    """out = x W^T + bias + residual, or with `silu_mul` silu(gate) * up of its two halves + residual.

    `gelu_tanh_mul` is the same with GELU in its tanh approximation.

    x         [m, in_features], 1 <= m <= MAX_ROWS
    weight    [out_features, in_features] of x's dtype; with silu_mul all rows of the gate, then of the up
              projection
    bias      [out_features]
    residual  [m, n], where n is out_features, or half of it with silu_mul; may be `out` itself
    out       [m, n] of any floating type
    inboxes   with them, what would go to `out` goes to all ranks, rounded to x's dtype; see `one_shot`

    All are contiguous. Sums are float32, rounded once at the end. Returns out.
    """
    num_rows, in_features = x.shape
    out_features = weight.shape[0]
    if not 1 <= num_rows <= MAX_ROWS:
        raise ValueError(f"gemv takes 1 to {MAX_ROWS} rows, not {num_rows}")
    gated = silu_mul or gelu_tanh_mul
    config = config or gemv_config(out_features, in_features, num_rows, gated)
    outputs = out_features // 2 if gated else out_features
    operands = (
        x,
        weight,
        weight if bias is None else bias,
        out if residual is None else residual,
        out,
        outputs,
    )
    # Where it goes with other ranks: there, and where their rows are in taking turns.
    there = (
        (x, x, 0, 0)
        if inboxes is None
        else (inboxes.addresses, inboxes.turns, inboxes.rank, inboxes.max_rows)
    )
    shape = {
        "K": in_features,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "WORLD_SIZE": 1 if inboxes is None else inboxes.world_size,
        "GATED": gated,
        "GELU": gelu_tanh_mul,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **early_launch(),
    }
    grid = (cdiv(outputs, config.block_n),)
    if num_rows == 1:
        _one_row_kernel[grid](*operands, *there, **shape)
    else:
        _few_rows_kernel[grid](*operands, *there, num_rows, **shape)
    return out


@kernel
@triton.jit(do_not_specialize=["rank", "max_rows"])
def _one_row_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    N,
    addresses_ptr,
    turns_ptr,
    rank,
    max_rows,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    WORLD_SIZE: tl.constexpr,
    GELU: tl.constexpr,
    EARLY: tl.constexpr,
):
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    inside = output < N
    rows_ptr = weight_ptr + output[:, None].to(tl.int64) * K + column[None, :]
    up_rows_ptr = weight_ptr + (output + N)[:, None].to(tl.int64) * K + column[None, :]
    # Each lane adds up its own columns; the lanes are added once, after the last of them.
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up_sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        within = (column + start < K) | (K % BLOCK_K == 0)
        mask = inside[:, None] & within[None, :]
        weight = tl.load(rows_ptr + start, mask, other=0.0, eviction_policy="evict_first")
        if GATED:
            up = tl.load(up_rows_ptr + start, mask, other=0.0, eviction_policy="evict_first")
        if start == 0:
            # The first weights are on their way before x is there.
            begin(EARLY)
        x = tl.load(x_ptr + start + column, within, other=0.0).to(tl.float32)[None, :]
        sums += weight.to(tl.float32) * x
        if GATED:
            up_sums += up.to(tl.float32) * x
    y = tl.sum(sums, 1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + output, inside, other=0.0).to(tl.float32)
    if GATED:
        up_y = tl.sum(up_sums, 1)
        if HAS_BIAS:
            up_y += tl.load(bias_ptr + N + output, inside, other=0.0).to(tl.float32)
        y = (gelu_tanh(y) if GELU else silu(y)) * up_y
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + output, inside, other=0.0).to(tl.float32)
    if WORLD_SIZE > 1:
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        send(y, 0, output, inside, addresses_ptr, turns_ptr, rank, max_rows, N, WORLD_SIZE, dtype)
    else:
        tl.store(out_ptr + output, y, inside)


@kernel
@triton.jit(do_not_specialize=["rank", "max_rows", "num_rows"])
def _few_rows_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    N,
    addresses_ptr,
    turns_ptr,
    rank,
    max_rows,
    num_rows,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    WORLD_SIZE: tl.constexpr,
    GELU: tl.constexpr,
    EARLY: tl.constexpr,
):
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    row = tl.arange(0, _PADDED_ROWS)
    inside = output < N
    rows_ptr = weight_ptr + output[:, None].to(tl.int64) * K + column[None, :]
    up_rows_ptr = weight_ptr + (output + N)[:, None].to(tl.int64) * K + column[None, :]
    x_columns_ptr = x_ptr + row[None, :] * K + column[:, None]
    sums = tl.zeros((BLOCK_N, _PADDED_ROWS), tl.float32)
    up_sums = tl.zeros((BLOCK_N, _PADDED_ROWS), tl.float32)
    wait(EARLY)
    for start in range(0, K, BLOCK_K):
        within = (column + start < K) | (K % BLOCK_K == 0)
        mask = inside[:, None] & within[None, :]
        x = tl.load(x_columns_ptr + start, (row < num_rows)[None, :] & within[:, None], other=0.0)
        weight = tl.load(rows_ptr + start, mask, other=0.0, eviction_policy="evict_first")
        sums = tl.dot(weight, x, sums)
        if GATED:
            up = tl.load(up_rows_ptr + start, mask, other=0.0, eviction_policy="evict_first")
            up_sums = tl.dot(up, x, up_sums)
    # Not before: the next kernel's programs would crowd where there is room beside these.
    let_next_start(EARLY)
    if HAS_BIAS:
        sums += tl.load(bias_ptr + output, inside, other=0.0).to(tl.float32)[:, None]
    if GATED:
        if HAS_BIAS:
            up_sums += tl.load(bias_ptr + N + output, inside, other=0.0).to(tl.float32)[:, None]
        sums = (gelu_tanh(sums) if GELU else silu(sums)) * up_sums
    cell = row[None, :] * N + output[:, None]
    mask = inside[:, None] & (row < num_rows)[None, :]
    if HAS_RESIDUAL:
        sums += tl.load(residual_ptr + cell, mask, other=0.0).to(tl.float32)
    if WORLD_SIZE > 1:
        there = tl.minimum(row, num_rows - 1)[None, :]
        column = output[:, None]
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        send(sums, there, column, mask, addresses_ptr, turns_ptr, rank, max_rows, N, WORLD_SIZE, dtype)
    else:
        tl.store(out_ptr + cell, sums, mask)


def gemv_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    silu_mul: bool = False,
    gelu_tanh_mul: bool = False,
) -> torch.Tensor:
    """The plain twin of `gemv`."""
    y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    if silu_mul or gelu_tanh_mul:
        gate, up = y.chunk(2, dim=-1)
        y = (F.gelu(gate, approximate="tanh") if gelu_tanh_mul else F.silu(gate)) * up
    return out.copy_(y if residual is None else y + residual.float())
