"""Memory of a GPU that is not torch's own, as a tensor."""

from __future__ import annotations

import torch


class _Adopted:
    """Device memory as torch takes it over: https://numba.readthedocs.io, "CUDA Array Interface"."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None,
        }  # fmt: skip


def adopted(address: int, num_bytes: int) -> torch.Tensor:
    """[num_bytes] uint8; whoever allocated the memory must keep it for as long as the tensor is used."""
    return torch.as_tensor(_Adopted(address, num_bytes), device="cuda")
