"""Linear layers over weights that stay where and as they were loaded."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from runtime.kernels import native
from runtime.kernels.activation import gelu_tanh_mul, silu_mul
from runtime.kernels.packed_linear import PackedLinear, packed_linear

if TYPE_CHECKING:
    from runtime.kernels.gpu.hopper.product import WideProduct
    from runtime.kernels.gpu.inboxes import Inboxes

# As `cpu/weights.h` numbers them.
NATIVE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MAX_NATIVE_PARTS = 3
# Up to here our own kernel reads a GPU's weights faster than the vendor's library does.
_MAX_GEMV_ROWS = 8
# But not with these [outputs, inputs], Llama-3-70B's on four H200s.
_ONE_ROW_ONLY = {(2560, 8192)}
# So does another one for so many rows of a large gate and up projection, on the GPUs that it is for.
_WIDE_ROWS = range(33, 257)


class LinearWeights:
    """The weights of y = x W^T + b, as one or more parts stacked along the outputs.

    Parts of a fused projection (q, k and v; gate and up) need not be neighbours in memory, so a mapped
    checkpoint can be used in place. Each weight is [out_features, in_features] with unit stride along
    the inputs, all of one dtype; each bias is [out_features] in float32, or None.
    """

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None] = ()) -> None:
        self.weights = tuple(weights)
        self.biases = tuple(biases) or (None,) * len(self.weights)
        self.out_features = sum(weight.shape[0] for weight in self.weights)
        self.in_features = self.weights[0].shape[1]
        self.suits_gemv = self._is_one_narrow_matrix
        shape = self.out_features, self.in_features
        most = 1 if shape in _ONE_ROW_ONLY else _MAX_GEMV_ROWS
        self.max_gemv_rows = most if self.suits_gemv else 0
        self.max_fused_rows = self._max_fused_rows
        # [in_features, out_features]
        self.transposed = self.weights[0].t() if self.suits_gemv else None
        self.lib = native.library() if self._suits_native() else None
        self.type = NATIVE_TYPES.get(self.weights[0].dtype, -1)
        parts = [
            native.Part(
                weight.data_ptr(),
                weight.shape[0],
                weight.stride(0),
                None if bias is None else bias.data_ptr(),
            )
            for weight, bias in zip(self.weights, self.biases, strict=True)
        ]
        self._parts = (native.Part * len(parts))(*parts)  # owns what `parts_address` points to
        self.parts_address = ctypes.addressof(self._parts)

    @cached_property
    def wide(self) -> WideProduct | None:
        """The product of `_WIDE_ROWS` with a gate and up projection, if this GPU has a kernel for it."""
        if not self.suits_gemv or self.biases[0] is not None:
            return None
        from runtime.kernels.gpu.hopper.product import WideProduct, suits

        return WideProduct(self.weights[0]) if suits(self.weights[0]) else None

    @property
    def read_first(self) -> torch.Tensor:
        """What products begin to read."""
        return self.weights[0]

    @property
    def _is_one_narrow_matrix(self) -> bool:
        (first, *others) = self.weights
        narrow = first.dtype in (torch.float16, torch.bfloat16)
        return not others and first.device.type == "cuda" and narrow and first.is_contiguous()

    @property
    def _max_fused_rows(self) -> int:
        """Up to how many rows a gated activation is computed with the product before it."""
        if not self.max_gemv_rows:
            return 0
        from runtime.kernels.gpu.early import can_start_early

        return self.max_gemv_rows if can_start_early() else 1

    def _suits_native(self) -> bool:
        return (
            len(self.weights) <= _MAX_NATIVE_PARTS
            and all(
                w.device.type == "cpu" and w.dtype in NATIVE_TYPES and w.stride(1) == 1 for w in self.weights
            )
            and all(bias is None or bias.dtype == torch.float32 for bias in self.biases)
        )


def linear(x: torch.Tensor, weights: LinearWeights | PackedLinear) -> torch.Tensor:
    """x [m, in_features] -> [m, out_features]; on the CPU x is contiguous float32."""
    if isinstance(weights, PackedLinear):
        return packed_linear(x, weights)
    if 0 < x.shape[0] <= weights.max_gemv_rows:
        return _gemv(x, weights, x.dtype)
    if weights.transposed is not None and x.dtype == weights.transposed.dtype:
        return _matmul(x, weights.transposed, weights.biases[0])
    lib = weights.lib
    if lib is None:
        return linear_torch(x, weights)
    m, k = x.shape
    y = torch.empty((m, weights.out_features))
    lib.linear(
        x.data_ptr(),
        m,
        k,
        y.data_ptr(),
        weights.out_features,
        weights.type,
        len(weights.weights),
        weights.parts_address,
    )
    return y


@dataclass(frozen=True, slots=True)
class Product:
    """What `linear` returns, before it is computed: who needs it may want it elsewhere, or only some rows."""

    x: torch.Tensor
    weights: LinearWeights | PackedLinear

    def __getitem__(self, rows: torch.Tensor) -> Product:
        return Product(self.x[rows], self.weights)

    def compute(self) -> torch.Tensor:
        """[m, out_features]"""
        return linear(self.x, self.weights)

    def send(self, inboxes: Inboxes) -> bool:
        """Have all ranks get it as soon as it is computed; whether that is possible. See `all_reduce.py`."""
        weights = self.weights
        if isinstance(weights, PackedLinear) or not 0 < self.x.shape[0] <= weights.max_gemv_rows:
            return False
        from runtime.kernels.gpu.gemv import gemv

        gemv(self.x, weights.weights[0], self.x, weights.biases[0], inboxes=inboxes)
        return True


def _matmul(x: torch.Tensor, transposed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """With fewer looks at its operands than `linear_torch`, which the host takes longer for than a GPU."""
    return torch.mm(x, transposed) if bias is None else torch.addmm(bias, x, transposed)


def _gemv(x: torch.Tensor, weights: LinearWeights, dtype: torch.dtype) -> torch.Tensor:
    from runtime.kernels.gpu.gemv import gemv

    out = torch.empty((x.shape[0], weights.out_features), dtype=dtype, device=x.device)
    return gemv(x, weights.weights[0], out, weights.biases[0])


def silu_linear(x: torch.Tensor, weights: LinearWeights | PackedLinear) -> torch.Tensor:
    """silu(gate) * up, both projections of x [m, in_features] fused in `weights` -> [m, out_features / 2]."""
    if isinstance(weights, PackedLinear):
        return packed_linear(x, weights, with_silu_mul=True)
    if 0 < x.shape[0] <= weights.max_fused_rows:
        return _gated_gemv(x, weights, gelu=False)
    if x.shape[0] in _WIDE_ROWS and x.dtype == weights.weights[0].dtype and weights.wide is not None:
        return weights.wide(x, x.new_empty((x.shape[0], weights.out_features // 2)))
    return silu_mul(linear(x, weights))


def gelu_tanh_linear(x: torch.Tensor, weights: LinearWeights | PackedLinear) -> torch.Tensor:
    """As `silu_linear` with GELU in its tanh approximation."""
    if isinstance(weights, LinearWeights) and 0 < x.shape[0] <= weights.max_fused_rows:
        return _gated_gemv(x, weights, gelu=True)
    return gelu_tanh_mul(linear(x, weights))


def _gated_gemv(x: torch.Tensor, weights: LinearWeights, gelu: bool) -> torch.Tensor:
    from runtime.kernels.gpu.gemv import gemv

    out = x.new_empty((x.shape[0], weights.out_features // 2))
    return gemv(x, weights.weights[0], out, weights.biases[0], silu_mul=not gelu, gelu_tanh_mul=gelu)


def logits_of(x: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
    """x [m, in_features] -> [m, out_features] in float32, however narrow x and the weights are."""
    if 0 < x.shape[0] <= weights.max_gemv_rows:
        return _gemv(x, weights, torch.float32)
    if x.device.type == "cuda" and x.dtype != torch.float32 and weights.biases[0] is None:
        return torch.mm(x, weights.weights[0].t(), out_dtype=torch.float32)
    return linear(x, weights).float()


def linear_torch(x: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
    """The plain twin of `linear`, for any device and dtype."""
    outputs = [
        F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        for weight, bias in zip(weights.weights, weights.biases, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
