"""Descriptions of matrices from which Hopper copies boxes into shared memory.

Source: the CUDA Driver API reference, "Tensor Map Object Management".
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int, c_uint32, c_uint64, c_void_p

import torch

BYTES = 128
_TYPES = {torch.float16: 6, torch.bfloat16: 9}  # CU_TENSOR_MAP_DATA_TYPE_*
_NOT_INTERLEAVED, _SWIZZLE_128B, _PROMOTION_256B, _ZEROS_OUTSIDE = 0, 3, 3, 0
_ALIGNMENT = 64


class TensorMap:
    """The matrices of one shape: `at` gives the description of the one at an address.

    sizes    of each dimension, the innermost first
    strides  bytes between neighbours along each dimension but the innermost
    box      what is copied at a time; the innermost dimension's part has 128 bytes
    """

    def __init__(
        self, dtype: torch.dtype, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
    ) -> None:
        rank = len(sizes)
        self._room = ctypes.create_string_buffer(BYTES + _ALIGNMENT)
        self._place = -(-ctypes.addressof(self._room) // _ALIGNMENT) * _ALIGNMENT
        self._kind = (c_int(_TYPES[dtype]), c_uint32(rank))
        self._shape = (
            (c_uint64 * rank)(*sizes),
            (c_uint64 * (rank - 1))(*strides),
            (c_uint32 * rank)(*box),
            (c_uint32 * rank)(*[1] * rank),
            *map(c_int, (_NOT_INTERLEAVED, _SWIZZLE_128B, _PROMOTION_256B, _ZEROS_OUTSIDE)),
        )
        self._encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled

    def at(self, address: int) -> bytes:
        """The description of the matrix at an address, a multiple of 16."""
        status = self._encode(c_void_p(self._place), *self._kind, c_void_p(address), *self._shape)
        if status:
            raise RuntimeError(f"A matrix could not be described (cuTensorMapEncodeTiled: {status}).")
        return ctypes.string_at(self._place, BYTES)
