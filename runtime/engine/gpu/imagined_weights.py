"""A model's weights as its engine would have them on a GPU, as tensors without data."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from runtime.kernels.packed import ROW_BLOCKS, PackedMatrix, field_of, in_order
from runtime.kernels.quantization import Quantization
from runtime.model.layers import Weights
from runtime.weights.plan import Plan, PlannedParameter

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def imagined_weights(plan: Plan, quantization: Quantization | None, dtype: torch.dtype) -> Iterator[Weights]:
    """Every kind of weights that a checkpoint with this plan may turn out to have.

    Whether quantised weights have zero points is not known before they are read.
    """
    by_name = {parameter.name: parameter for parameter in plan.parameters}
    plain = {
        name: tuple(_views(parameter, dtype))
        for name, parameter in by_name.items()
        if f"{name.rpartition('.')[0]}.qweight" not in by_name
    }
    if quantization is None:
        yield Weights(plain)
        return
    bases = [name.removesuffix(".qweight") for name in by_name if name.endswith(".qweight")]
    for has_zeros in (False,) if quantization.method == "fp8" else (False, True):
        packed = {}
        for base in bases:
            scales = by_name[f"{base}.scales"]
            matrix = _packed(by_name[f"{base}.qweight"], scales, quantization, has_zeros)
            if isinstance(matrix, PackedMatrix):
                packed[base] = matrix
            else:
                plain[base] = (_empty(matrix, dtype),)
        yield Weights(plain, packed)


def _views(parameter: PlannedParameter, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The parameter's tensors, as loading makes them."""
    for pieces in [parameter.pieces] if parameter.stacked else [(piece,) for piece in parameter.pieces]:
        rows = sum(piece.shape[0] for piece in pieces)
        yield _empty((rows, *pieces[0].shape[1:]), dtype)


def _packed(
    values: PlannedParameter, scales: PlannedParameter, quantization: Quantization, has_zeros: bool
) -> PackedMatrix | tuple[int, int]:
    """As `kernels/repack.py` makes it; the weight's shape where it would be none."""
    outputs, inputs = (sum(piece.shape[1] for piece in values.pieces), values.pieces[0].shape[0])
    if quantization.method == "fp8":
        outputs, inputs = sum(piece.shape[0] for piece in values.pieces), values.pieces[0].shape[1]
    elif quantization.method == "awq":
        outputs *= 32 // quantization.bits
    else:
        inputs *= 32 // quantization.bits
    group_size = inputs if quantization.group_size == -1 else quantization.group_size
    groups = -(-inputs // group_size)
    if quantization.method == "fp8":
        return PackedMatrix(
            _empty((outputs, inputs), torch.float8_e4m3fn),
            in_order(_empty((groups, outputs), torch.float32), 0),
            None,
            inputs,
            group_size,
        )
    field = field_of(group_size, inputs)
    if field is None or inputs % 2:
        return outputs, inputs
    chunk = field * (16 // quantization.bits)
    rows = ROW_BLOCKS[quantization.bits]
    return PackedMatrix(
        values=_empty((-(-outputs // rows), -(-inputs // chunk), rows, field), torch.int16),
        scales=in_order(_empty((groups, outputs), _DTYPES[scales.pieces[0].tensor.dtype]), quantization.bits),
        zeros=in_order(_empty((groups, outputs), torch.int8), quantization.bits) if has_zeros else None,
        in_features=inputs,
        group_size=group_size,
        bits=quantization.bits,
        field=field,
    )


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")
