"""Loaded tensors -> the decoder's weights, where and as the device's kernels take them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from runtime.kernels import native
from runtime.kernels.dequantize import dequantize_all
from runtime.kernels.packed import PackedMatrix
from runtime.kernels.quantization import Quantization
from runtime.kernels.repack import repack
from runtime.model.layers import Tensors, Weights

Packed = Mapping[str, PackedMatrix]


def turn_quantised(
    tensors: Tensors, quantization: Quantization | None, device: torch.device, dtype: torch.dtype
) -> Packed:
    """The projections that stay quantised on this device, in the kernels' layout and in the same memory.

    Those are all of the layers' on a GPU, unless their groups do not suit the kernels, and none on a CPU.
    """
    if quantization is None or device.type == "cpu" or dtype == torch.float32:
        return {}
    from runtime.kernels.gpu.packed_tiles import shared_workspace

    shared_workspace(device)
    packed = {}
    for name in tensors:
        base = name.removesuffix(".qweight")
        if (
            base != name
            and base.startswith("layers.")
            and (matrix := repack(tensors, base, quantization)) is not None
        ):
            packed[base] = matrix
    # What the turning took is wanted for the KV cache.
    torch.cuda.empty_cache()
    return packed


def place(
    tensors: Tensors,
    packed: Packed,
    quantization: Quantization | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Weights:
    """The weights of a decoder that computes in `dtype`: `packed` as they are, all others floating point."""
    if quantization is not None:
        rest = {name: parts for name, parts in tensors.items() if name.rpartition(".")[0] not in packed}
        # On a CPU they keep the width of their scales.
        tensors = dequantize_all(rest, quantization, None if device.type == "cpu" else dtype)
    if device.type == "cpu" and native.library() is not None:
        return Weights(tensors)
    placed = {name: tuple(part.to(device, dtype) for part in parts) for name, parts in tensors.items()}
    return Weights(placed, packed)
