"""Quantised weights from their checkpoint's layout to the kernels', on the device and in place.

The formats are described in `model/quantization.py`. Both layouts take the same room, so each projection is
turned in a copy and written back to where it was loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from runtime.kernels.dequantize import integers_of, spread_scales, zeros_of
from runtime.kernels.packed import PackedMatrix, field_of, in_blocks, pack_words
from runtime.kernels.quantization import Quantization

Tensors = Mapping[str, tuple[torch.Tensor, ...]]


def repack(weights: Tensors, base: str, quantization: Quantization) -> PackedMatrix | None:
    """The projection `base`, whose tensors are overwritten; None if its groups do not suit the kernels."""
    qweights, scales = weights[f"{base}.qweight"], weights[f"{base}.scales"]
    if quantization.method == "fp8":
        return _of_bytes(qweights, scales, quantization)
    order, fits = _order(weights.get(f"{base}.g_idx"), quantization.group_size)
    bits, per_word = quantization.bits, 32 // quantization.bits
    inputs = qweights[0].shape[0] * (1 if quantization.method == "awq" else per_word)
    group_size = inputs if quantization.group_size == -1 else quantization.group_size
    field = field_of(group_size, inputs)
    if not fits or field is None or inputs % 2 or scales[0].shape[0] != -(-inputs // group_size):
        return None
    packed = []
    for words in qweights:
        integers = integers_of(words, quantization)
        packed.append(pack_words(integers if order is None else integers[:, order], bits, field))
    zeros = torch.cat([zeros_of(words, quantization) for words in weights[f"{base}.qzeros"]], 1)
    points = (zeros.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    return PackedMatrix(
        values=_write_back(in_blocks(torch.cat(packed), bits, field), qweights),
        scales=_per_group(torch.cat(tuple(scales), 1), bits, scales),
        zeros=_per_group(points, bits, weights[f"{base}.qzeros"]) if points.any() else None,
        in_features=inputs,
        group_size=group_size,
        bits=bits,
        field=field,
        order=order,
    )


def _of_bytes(
    qweights: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], quantization: Quantization
) -> PackedMatrix:
    """E4m3 stays as it is; scales of tensors and blocks are written out for every output."""
    spread = [
        spread_scales(each, qweight.shape[0], quantization)
        for qweight, each in zip(qweights, scales, strict=True)
    ]
    inputs = qweights[0].shape[1]
    group_size = inputs if spread[0].shape[1] == 1 else quantization.group_size
    values = qweights[0] if len(qweights) == 1 else _write_back(torch.cat(tuple(qweights)), qweights)
    return PackedMatrix(values, torch.cat(spread).t(), None, inputs, group_size)


def _order(groups: Sequence[torch.Tensor] | None, group_size: int) -> tuple[torch.Tensor | None, bool]:
    """In which order inputs have to be taken for groups to be runs of neighbours, and whether there is one.

    `groups` are those of each part that is computed together, each [K] with the group of every input.
    """
    if groups is None:
        return None, True
    first = groups[0]
    if any(not torch.equal(first, other) for other in groups[1:]):
        return None, False
    order = torch.argsort(first, stable=True)
    runs = torch.arange(len(first), device=first.device) // group_size if group_size > 0 else first * 0
    fits = torch.equal(first[order].long(), runs.long())
    return (None if torch.equal(first, first[order]) else order), fits


def _per_group(turned: torch.Tensor, bits: int, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`in_order`, in the memory of `parts`."""
    return _write_back(turned, parts) if bits == 4 else _write_back(turned.t(), parts).t()


def _write_back(turned: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`turned` in the memory of `parts`, where those are neighbours on a device and it fits."""
    first = parts[0]
    if first.device.type != "cuda" or turned.nbytes > sum(part.nbytes for part in parts):
        return turned.contiguous()
    span = first.as_strided((-(-turned.nbytes // first.element_size()),), (1,), first.storage_offset())
    target = span.view(torch.uint8)[: turned.nbytes].view(turned.dtype).view(turned.shape)
    return target.copy_(turned)
