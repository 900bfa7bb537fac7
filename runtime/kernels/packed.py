"""Quantised weights in the layout that the kernels read, and what they mean in plain torch.

A weight is scale * (value - zero). Numbers of the e4m3 type stand one after the other and have no zeros.
Integers q of b bits, 4 or 8, have the value q - 2^(b - 1), so that symmetric weights need no zeros either.
They are packed into words of 16 bits, lowest bits first: of each `f * field` neighbouring inputs, f = 16 / b,
word j holds the inputs j, field + j, 2 field + j and so on, so that a run of words yields f runs of inputs.
The words of ROW_BLOCKS[b] outputs stand together, chunk by chunk: a GPU's memory is faster at long runs.
Scales and zeros stand as they are read beside the values: for 4 bits those of a group of inputs together,
else those of an output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# By bits. Rows of 8 bits are read by the thousand at once, when it is one that they are multiplied by.
ROW_BLOCKS = {4: 16, 8: 1}


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A weight [N, K] of N outputs and K inputs, of which `group_size` neighbours share a scale.

    values  [ceil(N / R), ceil(K / f field), R, field] int16 words, R = ROW_BLOCKS[b], or [N, K] float8_e4m3fn
    scales  [K / group_size, N], floating point, as `in_order` has them
    zeros   [K / group_size, N] int8, likewise, or None if all are zero
    bits    of an integer; 0 for e4m3
    field   inputs of a chunk that stand in the same bits of their words, all of one group; 0 for e4m3
    order   [K] int64, which input each column is for; None for as they are

    All others are contiguous.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    in_features: int
    group_size: int
    bits: int = 0
    field: int = 0
    order: torch.Tensor | None = None

    @property
    def out_features(self) -> int:
        """N"""
        return self.scales.shape[1]

    @property
    def groups(self) -> int:
        """How many runs of inputs have a scale each."""
        return self.scales.shape[0]

    @property
    def fields(self) -> int:
        """f, the integers in a word."""
        return 16 // self.bits if self.bits else 0

    @property
    def fields_per_scale(self) -> int:
        """How many fields of a chunk, counted from its first on, share a scale; 1 for e4m3."""
        chunk = self.fields * self.field
        if not chunk or self.groups == 1 or self.group_size % chunk == 0:
            return max(1, self.fields)
        return self.group_size // self.field if chunk % self.group_size == 0 else 1


def field_of(group_size: int, in_features: int) -> int | None:
    """How many inputs a field holds where so many share a scale; None if no field fits."""
    if group_size >= in_features:
        return 64
    return next((field for field in (64, 32) if group_size % field == 0), None)


def pack_words(integers: torch.Tensor, bits: int, field: int) -> torch.Tensor:
    """[N, K] uint8 below 2^bits -> [N, ceil(K / f field) * field] int16; what is missing has the value 0."""
    fields = 16 // bits
    missing = -integers.shape[1] % (fields * field)
    if missing:
        integers = torch.nn.functional.pad(integers, (0, missing), value=1 << (bits - 1))
    parts = list(integers.view(len(integers), -1, fields, field).unbind(2))
    if bits == 4:
        parts = [parts[0] | parts[1] << 4, parts[2] | parts[3] << 4]
    return torch.stack(parts, -1).view(torch.int16).flatten(1)


def in_blocks(words: torch.Tensor, bits: int, field: int) -> torch.Tensor:
    """[N, chunks * field] -> [ceil(N / R), chunks, R, field], which need not be contiguous."""
    rows = ROW_BLOCKS[bits]
    missing = -len(words) % rows
    if missing:
        words = torch.nn.functional.pad(words, (0, 0, 0, missing))
    return words.view(-1, rows, words.shape[1] // field, field).transpose(1, 2)


def in_order(per_group: torch.Tensor, bits: int) -> torch.Tensor:
    """Scales or zeros [groups, N] in the order in memory that kernels expect of weights of so many bits."""
    return per_group.contiguous() if bits == 4 else per_group.t().contiguous().t()


def unpack_words(words: torch.Tensor, bits: int, field: int, in_features: int) -> torch.Tensor:
    """What `pack_words` has packed."""
    parts = list(words.contiguous().view(torch.uint8).view(len(words), -1, field, 2).unbind(-1))
    if bits == 4:
        parts = [nibbles for each in parts for nibbles in (each & 15, each >> 4)]
    return torch.stack(parts, 2).flatten(1)[:, :in_features]


def dequantize_torch(matrix: PackedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """[N, K] in `dtype`, in the matrix's own order of inputs, rounded once from float32."""
    values = matrix.values.float()
    if matrix.bits:
        words = matrix.values.transpose(1, 2).flatten(2).flatten(0, 1)[: matrix.out_features]
        integers = unpack_words(words, matrix.bits, matrix.field, matrix.in_features)
        values = integers.float() - (1 << (matrix.bits - 1))

    def spread(per_group: torch.Tensor) -> torch.Tensor:
        return per_group.float().repeat_interleave(matrix.group_size, 0)[: matrix.in_features].t()

    if matrix.zeros is not None:
        values = values - spread(matrix.zeros)
    return (values * spread(matrix.scales)).to(dtype)
