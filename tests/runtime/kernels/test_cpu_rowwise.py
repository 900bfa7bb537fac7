"""The compiled kernels that treat each token by itself: norm, activation, rotary embedding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from runtime.kernels.activation import silu_mul, silu_mul_torch
from runtime.kernels.norm import add_rms_norm, add_rms_norm_torch
from runtime.kernels.rotary import rotary_store, rotary_store_torch
from tests.runtime.kernels.compiled import needs_kernels

pytestmark = needs_kernels

BATCHES = [1, 2, 3, 15, 16, 17, 33, 65]
WIDTHS = [1, 3, 4, 8, 15, 16, 20, 100, 577]


@pytest.mark.parametrize("with_addend", [True, False])
def test_norm(with_addend: bool) -> None:
    torch.manual_seed(0)
    for m in BATCHES:
        for n in WIDTHS:
            before, weight = torch.randn(m, n) * 30, torch.randn(n)
            x = torch.randn(m, n) if with_addend else None
            residual, twin = before.clone(), before.double()
            out = add_rms_norm(x, residual, weight, 1e-5)
            expected = add_rms_norm_torch(None if x is None else x.double(), twin, weight, 1e-5)
            torch.testing.assert_close(residual, twin.float())
            torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-6)
            for row in {0, m - 1}:
                own = None if x is None else x[row : row + 1]
                assert torch.equal(
                    add_rms_norm(own, before[row : row + 1].clone(), weight, 1e-5)[0], out[row]
                )


def test_activation() -> None:
    torch.manual_seed(1)
    for m in BATCHES:
        for n in WIDTHS:
            gate_up = torch.randn(m, 2 * n) * 5
            out = silu_mul(gate_up)
            torch.testing.assert_close(out, silu_mul_torch(gate_up.double()).float(), rtol=1e-5, atol=1e-7)
            assert torch.equal(silu_mul(gate_up[m - 1 :])[0], out[m - 1])


def test_activation_at_its_ends() -> None:
    gates = torch.tensor([-1e4, -500.0, -90.0, -87.0, -30.0, -0.0, 0.0, 30.0, 88.0, 500.0, 1e4]).repeat(3)
    out = silu_mul(torch.cat([gates, torch.ones_like(gates)])[None])
    expected = silu_mul_torch(torch.cat([gates, torch.ones_like(gates)])[None].double())
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(8, 8), (20, 20), (64, 64), (64, 16), (65, 64), (128, 128), (7, 2)]
)
@pytest.mark.parametrize("block_size", [8, 16])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2)])
def test_rotary_and_the_write_into_the_cache(
    head_dim: int, rotary_dim: int, block_size: int, heads: tuple[int, int]
) -> None:
    torch.manual_seed(2)
    num_heads, num_kv_heads = heads
    num_blocks = 9
    angles = torch.randn(50, rotary_dim // 2)
    cos_sin = torch.stack((angles.cos(), angles.sin()), dim=1).contiguous()
    for m in (1, 5, 16, 40):
        qkv = torch.randn(m, (num_heads + 2 * num_kv_heads) * head_dim)
        positions = torch.randint(0, 50, (m,))
        slots = torch.randperm(num_blocks * block_size)[:m]
        outcomes: list[list[Any]] = []
        for store in (rotary_store, rotary_store_torch):
            turned = qkv.clone()
            keys = torch.full((num_blocks, num_kv_heads, head_dim, block_size), torch.nan)
            values = torch.full((num_blocks, num_kv_heads, block_size, head_dim), torch.nan)
            store(turned, cos_sin, positions, slots, keys, values, num_heads)
            outcomes.append([turned, keys, values])
        for ours, twins in zip(*outcomes, strict=True):
            torch.testing.assert_close(ours, twins, rtol=1e-5, atol=1e-6, equal_nan=True)
