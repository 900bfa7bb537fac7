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
    qweights, qzeros, scales = (weights[f"{base}.{kind}"] for kind in ("qweight", "qzeros", "scales"))
    groups = weights.get(f"{base}.g_idx", (None,) * len(qweights))
    for parts in zip(qweights, qzeros, scales, groups, strict=True):
        yield dequantize(*parts, quantization).to(dtype or scales[0].dtype)


def dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor | None,
    quantization: Quantization,
) -> torch.Tensor:
    """One weight [N, K] in float32 from its packed tensors; `groups` [K] where they are not in order."""
    bits = quantization.bits
    if quantization.method == "awq":
        zeros = unpack(qzeros, bits, _AWQ_FIELDS)
        values = unpack(qweight, bits, _AWQ_FIELDS)
    else:
        fields = tuple(range(32 // bits))
        # A field of zeros overflows where what is added is added to the largest.
        zeros = (unpack(qzeros, bits, fields) + quantization.zero_offset) & ((1 << bits) - 1)
        values = unpack(qweight.t(), bits, fields).t()
    if groups is None:
        groups = _groups(values.shape[0], scales.shape[0], quantization.group_size, scales.device)
    groups = groups.long()
    return ((values - zeros[groups]).float() * scales.float()[groups]).t().contiguous()


def unpack(words: torch.Tensor, bits: int, fields: tuple[int, ...]) -> torch.Tensor:
    """[R, C] int32 -> [R, C * len(fields)] int32: of each word, the fields in this order."""
    shifts = torch.tensor(fields, dtype=torch.int32, device=words.device) * bits
    # Shifting a negative word brings ones in from the left, which the mask takes away.
    return ((words[:, :, None] >> shifts) & ((1 << bits) - 1)).flatten(1)


def _groups(inputs: int, num_groups: int, group_size: int, device: torch.device) -> torch.Tensor:
    """[K] the group of each input, where groups are runs of neighbours."""
    size = inputs if group_size == -1 else group_size
    if -(-inputs // size) != num_groups:
        raise QuantizationError(
            f"{inputs} inputs of a layer have {num_groups} groups of {size}: with fewer ranks "
            "(--tensor-parallel-size) each would have whole groups."
        )
    return torch.arange(inputs, device=device) // size
