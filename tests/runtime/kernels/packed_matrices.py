"""Random quantised weights in the kernels' layout."""

from __future__ import annotations

import torch

from runtime.kernels.packed import PackedMatrix, field_of, in_blocks, in_order, pack_words


def random_matrix(
    kind: str,
    out_features: int,
    in_features: int,
    group_size: int = -1,
    zeros: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    device: str = "cpu",
) -> PackedMatrix:
    """Of `kind` int8, int4 or fp8; weights come out at about 1 / sqrt(in_features)."""
    group = in_features if group_size == -1 else group_size
    shape, groups = (out_features, in_features), -(-in_features // group)
    bits = {"int8": 8, "int4": 4, "fp8": 0}[kind]
    largest = float(1 << (bits - 1)) if bits else 2.0
    scales = (torch.rand(groups, out_features, device=device) + 0.5) / (largest * in_features**0.5)
    scales = in_order(scales.to(scale_dtype), bits)
    if not bits:
        values = torch.randn(shape, device=device).to(torch.float8_e4m3fn)
        return PackedMatrix(values, scales, None, in_features, group)
    field = field_of(group, in_features)
    assert field is not None
    integers = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, device=device)
    half = 1 << (bits - 1)
    points = torch.randint(-half, half, scales.shape, dtype=torch.int8, device=device)
    values = in_blocks(pack_words(integers, bits, field), bits, field).contiguous()
    return PackedMatrix(
        values, scales, in_order(points, bits) if zeros else None, in_features, group, bits, field
    )
