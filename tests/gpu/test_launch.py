"""A launch finds the variant of a kernel that was compiled for arguments of its kind, and no other."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

import triton
import triton.language as tl

from runtime.kernels.gpu.launch import kernel

pytestmark = pytest.mark.gpu
SIZE = 256


@kernel
@triton.jit
def _scale_kernel(x_ptr, y_ptr, out_ptr, factor, shift, SIZE: tl.constexpr, NEGATE: tl.constexpr):
    place = tl.arange(0, SIZE)
    x = tl.load(x_ptr + place).to(tl.float64) * factor + shift
    if y_ptr is not None:
        x += tl.load(y_ptr + place)
    tl.store(out_ptr + place, -x if NEGATE else x)


@pytest.mark.parametrize("again", range(2))
@pytest.mark.parametrize("negate", [False, True])
@pytest.mark.parametrize("factor", [0, 1, 2, 16, 48, -16, 2**31, 2**40, 1.0, 2.5])
def test_results_are_torchs_whatever_the_arguments(factor: float, negate: bool, again: int) -> None:
    numbers = torch.arange(4.0 * SIZE, device="cuda")
    for dtype in (torch.float32, torch.float16, torch.int32):
        for start in (0, 1, 3, 16):
            x = numbers.to(dtype)[start : start + SIZE]
            y = numbers[2 * start : 2 * start + SIZE]
            for other in (None, y):
                out = torch.empty(SIZE + 1, dtype=torch.float64, device="cuda")[start % 2 :][:SIZE]
                _scale_kernel[(1,)](x, other, out, factor, 0.5, SIZE=SIZE, NEGATE=negate)
                expected = x.double() * factor + 0.5 + (0 if other is None else other.double())
                assert torch.equal(out, -expected if negate else expected)
