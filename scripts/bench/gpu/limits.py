"""What the GPU can do, measured in the same run: memory read by a kernel that does nothing else, and a
large bf16 matrix product of random numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpu.timing import replay_seconds

_READ_BYTES = 2 << 30
_MATRIX = 8192


@dataclass(frozen=True)
class Limits:
    """Bytes a second read from memory, operations a second of a bf16 matrix product."""

    read: float
    product: float


def measure() -> Limits:
    return Limits(max(_read(block) for block in (4096, 8192, 16384)), _product())


@triton.jit
def _sum_kernel(numbers, sums, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK
    tl.store(sums + tl.program_id(0), tl.sum(tl.load(numbers + place + tl.arange(0, BLOCK))))


def _read(block: int) -> float:
    numbers = torch.randint(100, (_READ_BYTES // 4,), dtype=torch.int32, device="cuda")
    programs = numbers.numel() // block
    sums = torch.empty(programs, dtype=torch.int32, device="cuda")
    return _READ_BYTES / replay_seconds(lambda: _sum_kernel[(programs,)](numbers, sums, BLOCK=block))


def _product() -> float:
    a, b = (torch.randn(_MATRIX, _MATRIX, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return 2 * _MATRIX**3 / replay_seconds(lambda: torch.mm(a, b, out=out))
