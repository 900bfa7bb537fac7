"""The block formats of ggml tensors, and how each is turned back into float32.

A tensor is stored row after row, a row as blocks of `block_size` consecutive values, and a block as
`block_bytes` bytes. Every function here takes blocks as uint8 [num_blocks, block_bytes] and returns
float32 [num_blocks, block_size].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class GGMLType(NamedTuple):
    """One way of storing values. `dequantise` maps [n, block_bytes] uint8 to [n, block_size] float32."""

    name: str
    block_size: int
    block_bytes: int
    dequantise: Callable[[Bytes], Floats]


def _view(blocks: Bytes, start: int, stop: int, dtype: str) -> npt.NDArray[Any]:
    """Columns [start, stop) of the blocks, reinterpreted as little-endian `dtype`."""
    return np.ascontiguousarray(blocks[:, start:stop]).view(dtype)


def _half(blocks: Bytes, start: int) -> Floats:
    """The float16 at byte `start` of each block, as float32 [n, 1]."""
    return _view(blocks, start, start + 2, "<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """All low nibbles of a block first, then all high ones: [n, k] -> [n, 2 * k]."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=1)


def _fifth_bits(blocks: Bytes, start: int) -> Bytes:
    """The 32 bits stored at byte `start`, each moved to bit 4 of its own value: [n, 32]."""
    return np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little") << np.uint8(4)


def _f32(blocks: Bytes) -> Floats:
    return _view(blocks, 0, 4, "<f4").astype(np.float32, copy=False)


def _f16(blocks: Bytes) -> Floats:
    return _half(blocks, 0)


def _bf16(blocks: Bytes) -> Floats:
    return (_view(blocks, 0, 2, "<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    return (_nibbles(blocks[:, 2:]).astype(np.float32) - 8) * _half(blocks, 0)


def _q4_1(blocks: Bytes) -> Floats:
    return _nibbles(blocks[:, 4:]).astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    values = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return (values.astype(np.float32) - 16) * _half(blocks, 0)


def _q5_1(blocks: Bytes) -> Floats:
    values = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return values.astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _half(blocks, 0)


def _six_bit_scales(packed: Bytes) -> tuple[Floats, Floats]:
    """Eight scales and eight minima of 6 bits each from 12 bytes: two float32 arrays [n, 8, 1].

    The first four of each lie in the low bits of bytes 0..3 and 4..7. The last four have their low
    nibbles in bytes 8..11 and their upper two bits in the spare bits of bytes 0..3 and 4..7.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 0x3F, (third & 0x0F) | ((first >> 2) & 0x30)], axis=1)
    minima = np.concatenate([second & 0x3F, (third >> 4) | ((second >> 2) & 0x30)], axis=1)
    return scales.astype(np.float32)[..., None], minima.astype(np.float32)[..., None]


def _paired_nibbles(packed: Bytes) -> Bytes:
    """[n, 128] bytes -> [n, 8, 32]: each run of 32 bytes holds a group in its low, then its high nibbles."""
    runs = packed.reshape(-1, 4, 1, 32)
    return np.concatenate([runs & 0x0F, runs >> 4], axis=2).reshape(-1, 8, 32)


def _scaled_groups(blocks: Bytes, values: Bytes) -> Floats:
    """[n, 8, 32] values of the 4- and 5-bit K formats, with their scales and minima applied: [n, 256]."""
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    scales *= _half(blocks, 0)[..., None]
    minima *= _half(blocks, 2)[..., None]
    return (values.astype(np.float32) * scales - minima).reshape(-1, 256)


def _q4_k(blocks: Bytes) -> Floats:
    return _scaled_groups(blocks, _paired_nibbles(blocks[:, 16:144]))


def _q5_k(blocks: Bytes) -> Floats:
    groups = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    fifth = (blocks[:, None, 16:48] >> groups) & np.uint8(1)
    return _scaled_groups(blocks, _paired_nibbles(blocks[:, 48:176]) | (fifth << np.uint8(4)))


def _q6_k(blocks: Bytes) -> Floats:
    low = blocks[:, 0:128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 0x0F, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8).reshape(1, 1, 4, 1)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    values = (low | (high << 4)).reshape(-1, 16, 16).astype(np.float32) - 32
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32) * _half(blocks, 208)
    return (values * scales[..., None]).reshape(-1, 256)


TYPES: dict[int, GGMLType] = {
    0: GGMLType("F32", 1, 4, _f32),
    1: GGMLType("F16", 1, 2, _f16),
    2: GGMLType("Q4_0", 32, 18, _q4_0),
    3: GGMLType("Q4_1", 32, 20, _q4_1),
    6: GGMLType("Q5_0", 32, 22, _q5_0),
    7: GGMLType("Q5_1", 32, 24, _q5_1),
    8: GGMLType("Q8_0", 32, 34, _q8_0),
    12: GGMLType("Q4_K", 256, 144, _q4_k),
    13: GGMLType("Q5_K", 256, 176, _q5_k),
    14: GGMLType("Q6_K", 256, 210, _q6_k),
    30: GGMLType("BF16", 1, 2, _bf16),
}
