"""Linear layers over quantised weights on a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from runtime.kernels.packed import PackedMatrix

# From this many rows on, weights are brought back to floating point first, for the vendor's library.
DEQUANTIZE_ROWS = 512


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """The weights of y = x W^T + b; the bias is [out_features] in x's dtype, or None."""

    matrix: PackedMatrix
    bias: torch.Tensor | None = None

    @property
    def out_features(self) -> int:
        """Columns of y."""
        return self.matrix.out_features


def packed_linear(x: torch.Tensor, weights: PackedLinear, with_silu_mul: bool = False) -> torch.Tensor:
    """x [m, in_features], 16 bits wide -> [m, out_features], or of one row silu(gate) * up of its halves."""
    from runtime.kernels.gpu.packed_dequantize import dequantize
    from runtime.kernels.gpu.packed_gemv import packed_gemv
    from runtime.kernels.gpu.packed_tiles import packed_tiles, shared_workspace, tile_config

    matrix = weights.matrix
    if matrix.order is not None:
        x = x[:, matrix.order]
    if x.shape[0] >= DEQUANTIZE_ROWS or x.shape[0] == 0:
        weight = dequantize(matrix, x.new_empty((matrix.out_features, matrix.in_features)))
        return F.linear(x, weight, weights.bias)
    out = x.new_empty((x.shape[0], matrix.out_features // 2 if with_silu_mul else matrix.out_features))
    if x.shape[0] == 1:
        return packed_gemv(x, matrix, out, weights.bias, with_silu_mul)
    config = tile_config(matrix, x.shape[0], _num_sms(x.device))
    return packed_tiles(x, matrix, out, config, shared_workspace(x.device), weights.bias)


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
