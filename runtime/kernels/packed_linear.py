"""Linear layers over quantised weights on a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from runtime.kernels.activation import silu_mul
from runtime.kernels.packed import PackedMatrix

# From this many rows on, weights are brought back to floating point first, for the vendor's library.
DEQUANTIZE_ROWS = 512
# Bytes of shared memory that a program may have, by compute capability: CUDA's programming guide, "Technical
# specifications per compute capability".
_SHARED_BYTES = {
    (8, 0): 163 << 10,
    (8, 7): 163 << 10,
    (9, 0): 227 << 10,
    (10, 0): 227 << 10,
    (10, 3): 227 << 10,
}
_LEAST_SHARED_BYTES = 99 << 10


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """The weights of y = x W^T + b; the bias is [out_features] in x's dtype, or None."""

    matrix: PackedMatrix
    bias: torch.Tensor | None = None

    @property
    def out_features(self) -> int:
        """Columns of y."""
        return self.matrix.out_features

    @property
    def read_first(self) -> torch.Tensor:
        """What products begin to read."""
        return self.matrix.values


def packed_linear(x: torch.Tensor, weights: PackedLinear, with_silu_mul: bool = False) -> torch.Tensor:
    """x [m, in_features], 16 bits wide -> [m, out_features], or silu(gate) * up of its two halves."""
    from runtime.kernels.gpu.packed_config import tile_config
    from runtime.kernels.gpu.packed_gemv import packed_gemv, suits_gemv
    from runtime.kernels.gpu.packed_tiles import packed_tiles, shared_workspace

    matrix = weights.matrix
    if matrix.order is not None:
        x = x[:, matrix.order]
    if x.shape[0] >= DEQUANTIZE_ROWS or x.shape[0] == 0:
        y = _many_rows(x, weights)
        return silu_mul(y) if with_silu_mul else y
    out = x.new_empty((x.shape[0], matrix.out_features // 2 if with_silu_mul else matrix.out_features))
    if x.shape[0] == 1 and suits_gemv(matrix):
        return packed_gemv(x, matrix, out, weights.bias, with_silu_mul)
    config = tile_config(matrix, x.shape[0], *_size(x.device))
    return packed_tiles(x, matrix, out, config, shared_workspace(x.device), weights.bias, with_silu_mul)


def _many_rows(x: torch.Tensor, weights: PackedLinear) -> torch.Tensor:
    """The product by the vendor's library."""
    from runtime.kernels.gpu.packed_dequantize import dequantize

    matrix = weights.matrix
    weight = dequantize(matrix, x.new_empty((matrix.out_features, matrix.in_features)))
    return F.linear(x, weight, weights.bias)


@functools.cache
def _size(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of the device, and the shared memory that a program may have."""
    capability = torch.cuda.get_device_capability(device)
    shared_bytes = _SHARED_BYTES.get(capability, _LEAST_SHARED_BYTES)
    return torch.cuda.get_device_properties(device).multi_processor_count, shared_bytes
