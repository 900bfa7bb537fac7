"""Products with quantised weights against torch's with the weights that they mean, in double precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from runtime.engine import kernels_ahead
from runtime.kernels.gpu.packed_config import (
    WORKSPACE_ELEMENTS,
    WORKSPACE_TILES,
    TileConfig,
    tile_bytes,
    tile_config,
)
from runtime.kernels.gpu.packed_dequantize import dequantize
from runtime.kernels.gpu.packed_gemv import PackedGemvConfig, packed_gemv, packed_product_torch
from runtime.kernels.gpu.packed_tiles import TileWorkspace, packed_tiles
from runtime.kernels.packed import PackedMatrix, dequantize_torch, pack_words, unpack_words
from runtime.kernels.packed_linear import DEQUANTIZE_ROWS
from tests.runtime.kernels.packed_matrices import random_matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
MATRICES = {
    "int8, groups of 128": ("int8", 256, 128, False),
    "int8, groups of 32 with zeros": ("int8", 160, 32, True),
    "int8, one group": ("int8", 136, -1, False),
    "int4, groups of 128": ("int4", 512, 128, False),
    "int4, groups of 128 with zeros": ("int4", 384, 128, True),
    "int4, groups of 64 with zeros": ("int4", 320, 64, True),
    "int4, groups of 32": ("int4", 96, 32, False),
    "int4, one group with zeros": ("int4", 136, -1, True),
    "fp8, one scale a row": ("fp8", 136, -1, False),
    "fp8, blocks of 128": ("fp8", 384, 128, False),
}


def matrix_of(name: str, out_features: int = 44) -> PackedMatrix:
    kind, in_features, group_size, zeros = MATRICES[name]
    torch.manual_seed(0)
    return random_matrix(kind, out_features, in_features, group_size, zeros, device=DEVICE)


def expected(x: torch.Tensor, matrix: PackedMatrix, bias: torch.Tensor | None, gated: bool) -> torch.Tensor:
    weight = dequantize_torch(matrix, torch.float64)
    y = F.linear(x.double(), weight, None if bias is None else bias.double())
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up if gated else y


@pytest.mark.parametrize("field", [32, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_what_was_packed(bits: int, field: int) -> None:
    integers = torch.randint(0, 1 << bits, (5, 300), dtype=torch.uint8)
    words = pack_words(integers, bits, field)
    fields = 16 // bits
    assert words.shape[1] * fields == -(-300 // (fields * field)) * fields * field
    assert torch.equal(unpack_words(words, bits, field, 300), integers)
    # The input after next of the second field of the second chunk.
    place = (fields + 1) * field + 2
    expected = integers[3, place] if place < 300 else 1 << (bits - 1)
    assert int(words[3, field + 2]) >> bits & ((1 << bits) - 1) == expected


def small_blocks(*args: Any) -> None:
    """The kernel, several times along the inputs and with blocks that the outputs do not fill."""
    packed_gemv(*args, PackedGemvConfig(8, 64, 1, 4))


@pytest.mark.parametrize("multiply", [packed_gemv, small_blocks, packed_product_torch])
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize(("gated", "dtype"), [(False, torch.bfloat16), (True, torch.float16)])
def test_one_row(multiply: Any, name: str, gated: bool, dtype: torch.dtype) -> None:
    matrix = matrix_of(name)
    x = torch.randn(1, matrix.in_features, device=DEVICE).to(dtype)
    bias = torch.randn(44, device=DEVICE).to(dtype)
    given = bias if gated else None
    out = torch.empty(1, 22 if gated else 44, device=DEVICE)
    multiply(x, matrix, out, given, gated)
    torch.testing.assert_close(out.double(), expected(x, matrix, given, gated), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize(("splits", "whole", "scales_first"), [(1, 0, True), (3, 4, False)])
def test_tiles(name: str, splits: int, whole: int, scales_first: bool) -> None:
    matrix = matrix_of(name)
    x = torch.randn(19, matrix.in_features, device=DEVICE).half()
    bias = torch.randn(44, device=DEVICE).half()
    # Of six tiles; those of the last outputs and the last rows are not full.
    workspace = TileWorkspace.allocate((6 - whole) * splits * 16 * 16, 6 - whole, DEVICE)
    config = TileConfig(16, 16, splits, 4, 2, scales_first, whole)
    # Scales that come first round the weights to 11 bits.
    tolerance = 2e-3 if scales_first else 1e-5
    given = bias if scales_first else None
    out = torch.empty(19, 44, device=DEVICE)
    packed_tiles(x, matrix, out, config, workspace, given)
    torch.testing.assert_close(
        out.double(), expected(x, matrix, given, False), atol=tolerance, rtol=tolerance
    )
    assert not workspace.counters.any()


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_back_to_floating_point(name: str, dtype: torch.dtype) -> None:
    matrix = matrix_of(name)
    out = torch.full((44, matrix.in_features), torch.nan, dtype=dtype, device=DEVICE)
    assert torch.equal(dequantize(matrix, out), dequantize_torch(matrix, dtype))


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("shape", [(55296, 512), (5120, 27648), (7168, 5120), (896, 128)])
@pytest.mark.parametrize("shared_kib", [99, 163, 227])
def test_shares_fit_the_workspace_and_the_gpu(kind: str, shape: tuple[int, int], shared_kib: int) -> None:
    small = random_matrix(kind, 16, 512, 128)
    matrix = replace(small, scales=torch.empty(small.groups, shape[0]), in_features=shape[1])
    for num_rows in range(1, 520):
        config = tile_config(matrix, num_rows, 132, shared_kib << 10)
        assert tile_bytes(matrix, config) <= shared_kib << 10
        assert config.splits == 1 or shape[1] // config.splits >= 1024
        tiles = -(-num_rows // config.block_m) * -(-shape[0] // config.block_n)
        split = tiles - config.whole
        if config.splits > 1:
            assert 0 < split <= WORKSPACE_TILES
            assert split * config.splits * config.block_m * config.block_n <= WORKSPACE_ELEMENTS


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("shared_kib", [99, 163, 227])
def test_steps_that_are_compiled_ahead_have_every_tile(kind: str, shared_kib: int) -> None:
    matrix = random_matrix(kind, 64, 4096, 128)

    def tile(num_rows: int) -> TileConfig:
        return replace(tile_config(matrix, num_rows, 132, shared_kib << 10), splits=1, whole=0)

    steps = [num_decodes + sum(prompts) for num_decodes, prompts in kernels_ahead._STEPS]
    ahead = {tile(num_rows) for num_rows in steps if 1 < num_rows < DEQUANTIZE_ROWS}
    assert ahead == {tile(num_rows) for num_rows in range(2, DEQUANTIZE_ROWS)}
