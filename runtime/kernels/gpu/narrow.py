"""Rows rounded to e4m3, each with a scale of its own, for products of 8-bit numbers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime.kernels.gpu.launch import kernel

LARGEST = 448.0  # of e4m3
_LARGEST = tl.constexpr(LARGEST)
_SMALLEST_SCALE = tl.constexpr(1e-12)
_BLOCK = 2048


def narrow_rows(x: torch.Tensor, out: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x [m, K] -> out [m, K] float8_e4m3fn and scales [m, 1] float32, with x nearly scales * out.

    The largest number of a row becomes 448. All are contiguous. Returns out.
    """
    m, k = x.shape
    _narrow_kernel[(m,)](x, out, scales, K=k, BLOCK=_BLOCK, num_warps=4)
    return out


@kernel
@triton.jit
def _narrow_kernel(x_ptr, out_ptr, scales_ptr, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        x = tl.load(x_ptr + row * K + start + column, column + start < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    scale = tl.maximum(tl.max(largest, 0) / _LARGEST, _SMALLEST_SCALE)
    tl.store(scales_ptr + row, scale)
    for start in range(0, K, BLOCK):
        x = tl.load(x_ptr + row * K + start + column, column + start < K, other=0.0).to(tl.float32)
        # Rounding may lift the largest a little above what there is.
        narrow = tl.minimum(tl.maximum(x / scale, -_LARGEST), _LARGEST)
        tl.store(out_ptr + row * K + start + column, narrow.to(out_ptr.dtype.element_ty), column + start < K)


def narrow_rows_torch(x: torch.Tensor, out: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The plain twin of `narrow_rows`."""
    scales.copy_((x.float().abs().amax(1, keepdim=True) / LARGEST).clamp(min=1e-12))
    return out.copy_((x.float() / scales).clamp(-LARGEST, LARGEST))
