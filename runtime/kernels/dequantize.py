"""Quantised weights back to floating point, in plain torch; the formats: `model/quantization.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from runtime.errors import FirstlightError
from runtime.kernels.quantization import Quantization

Weights = Mapping[str, tuple[torch.Tensor, ...]]

# Which of a word's eight fields holds each of eight neighbouring outputs, in AWQ's packing.
_AWQ_FIELDS = (0, 4, 1, 5, 2, 6, 3, 7)


class QuantizationError(FirstlightError):
    """Quantised weights that do not fit together."""


def dequantize_all(
    weights: Weights, quantization: Quantization, dtype: torch.dtype | None = None
) -> dict[str, tuple[torch.Tensor, ...]]:
    """All parameters, the quantised ones as weights [N, K] of `dtype`, None for that of their scales.

    What is computed together becomes one tensor, and so do its biases.
    """
    plain: dict[str, tuple[torch.Tensor, ...]] = {}
    for name, parts in weights.items():
        base, _, kind = name.rpartition(".")
        if kind == "qweight":
            plain[base] = (torch.cat(list(_dequantize_parts(weights, base, quantization, dtype))),)
        elif name.endswith("_bias") and f"{name.removesuffix('_bias')}.qweight" in weights:
            plain[name] = (torch.cat(parts),)
        elif f"{base}.qweight" not in weights:
            plain[name] = parts
    return plain


def _dequantize_parts(
    weights: Weights, base: str, quantization: Quantization, dtype: torch.dtype | None
) -> Iterator[torch.Tensor]:
    qweights, scales = weights[f"{base}.qweight"], weights[f"{base}.scales"]
    if quantization.method == "fp8":
        for qweight, scale in zip(qweights, scales, strict=True):
            spread = spread_scales(scale, qweight.shape[0], quantization)
            groups = torch.arange(qweight.shape[1], device=spread.device) // group_size(qweight, quantization)
            yield (qweight.float() * spread[:, groups]).to(dtype or torch.bfloat16)
        return
    orders = weights.get(f"{base}.g_idx", (None,) * len(qweights))
    for parts in zip(qweights, weights[f"{base}.qzeros"], scales, orders, strict=True):
        yield dequantize(*parts, quantization).to(dtype or scales[0].dtype)


def dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor | None,
    quantization: Quantization,
) -> torch.Tensor:
    """One weight [N, K] in float32 from its packed tensors; `groups` [K] where they are not in order."""
    integers = integers_of(qweight, quantization)
    if groups is None:
        groups = _groups(integers.shape[1], scales.shape[0], quantization.group_size, scales.device)
    groups = groups.long()
    zeros = zeros_of(qzeros, quantization).float().t()
    return (integers.float() - zeros[:, groups]) * scales.float().t()[:, groups]


def integers_of(qweight: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """What is packed in a tensor of weights, [N, K] uint8."""
    if quantization.method == "awq":
        return _unpack(qweight, quantization.bits)[..., _AWQ_FIELDS].flatten(1).t()
    return _unpack(qweight, quantization.bits).transpose(0, 1).flatten(1)


def zeros_of(qzeros: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """The zero points that are packed in a tensor of them, [groups, N] uint8."""
    zeros = _unpack(qzeros, quantization.bits)
    if quantization.method == "awq":
        return zeros[..., _AWQ_FIELDS].flatten(1)
    # A field of zeros overflows where what is added is added to the largest.
    return (zeros.flatten(1) + quantization.zero_offset) & ((1 << quantization.bits) - 1)


def _unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, C] int32 -> [R, C, 32 / bits] uint8, lowest bits first."""
    parts = words.contiguous().view(torch.uint8).view(*words.shape, 4)
    return parts if bits == 8 else torch.stack((parts & 15, parts >> 4), -1).flatten(2)


def spread_scales(scales: torch.Tensor, outputs: int, quantization: Quantization) -> torch.Tensor:
    """Scales of e4m3 weights, one for all, for each output or for each block, -> [N, groups] float32."""
    table = scales.float().reshape(-1, scales.shape[1] if scales.ndim == 2 else 1)
    return table.repeat_interleave(outputs if len(table) == 1 else quantization.block_rows, 0)[:outputs]


def group_size(qweight: torch.Tensor, quantization: Quantization) -> int:
    """How many inputs of an e4m3 weight [N, K] share a scale."""
    return qweight.shape[1] if quantization.group_size == -1 else quantization.group_size


def _groups(inputs: int, num_groups: int, per_group: int, device: torch.device) -> torch.Tensor:
    """[K] the group of each input, where groups are runs of neighbours."""
    size = inputs if per_group == -1 else per_group
    if -(-inputs // size) != num_groups:
        raise QuantizationError(
            f"{inputs} inputs of a layer have {num_groups} groups of {size}: with fewer ranks "
            "(--tensor-parallel-size) each would have whole groups."
        )
    return torch.arange(inputs, device=device) // size
