"""Products with quantised weights at the shapes of real models' layers, against float32 products of the
weights that they mean."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from runtime.kernels.gpu.packed_config import TileConfig
from runtime.kernels.gpu.packed_dequantize import dequantize
from runtime.kernels.gpu.packed_gemv import packed_gemv
from runtime.kernels.gpu.packed_tiles import TileWorkspace, packed_tiles
from runtime.kernels.packed import dequantize_torch
from runtime.kernels.packed_linear import PackedLinear, packed_linear
from tests.gpu.apart import tried_apart
from tests.runtime.kernels.packed_matrices import random_matrix

pytestmark = pytest.mark.gpu
LAYERS = {
    "Qwen2.5-32B's down": (5120, 27648),
    "Qwen2.5-7B's gate and up": (37888, 3584),
    "Qwen2.5-0.5B's down": (896, 4864),
    "Baichuan-13B's down": (5120, 13696),
}
FORMATS = {
    "int8": ("int8", 128, False),
    "int8 with zeros": ("int8", 128, True),
    "int8, groups of 32": ("int8", 32, False),
    "int4": ("int4", 128, False),
    "int4 with zeros": ("int4", 128, True),
    "int4, groups of 64": ("int4", 64, False),
    "int4, one group": ("int4", -1, False),
    "fp8": ("fp8", -1, False),
    "fp8 in blocks": ("fp8", 128, False),
}
# Some tiles whole and others split; all split; none.
CONFIGS = [
    TileConfig(8, 64, 4, 4, 3, whole=5),
    TileConfig(64, 64, 2, 4, 3),
    TileConfig(128, 128, 1, 4, 3, True, step=32),
]
CASES = [
    *((layer, format, "float16") for layer in LAYERS for format in ("int8", "int4")),
    *(("Qwen2.5-0.5B's down", format, "bfloat16") for format in FORMATS),
    ("Qwen2.5-0.5B's down", "int4 with zeros", "float16"),
]
# Scales that come first round each weight to the width of the rows.
ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 2e-2}


def check_layer(layer: str, format: str, dtype_name: str) -> None:
    torch.manual_seed(0)
    dtype = getattr(torch, dtype_name)
    kind, group_size, zeros = FORMATS[format]
    matrix = random_matrix(kind, *LAYERS[layer], group_size, zeros, device="cuda")
    weight = dequantize_torch(matrix, torch.float32)
    assert torch.equal(dequantize(matrix, torch.empty_like(weight, dtype=dtype)), weight.to(dtype))
    rows = torch.randn(300, matrix.in_features, device="cuda").to(dtype)
    expected = rows.double() @ weight.double().T
    size = expected.std()

    def check(out: torch.Tensor, right: torch.Tensor, tolerance: float) -> None:
        torch.testing.assert_close(out.double() / size, right / size, atol=tolerance, rtol=tolerance)

    # Float32 sums of thousands of products.
    one = torch.empty_like(expected[:1], dtype=torch.float32)
    check(packed_gemv(rows[:1], matrix, one), expected[:1], 1e-4)
    workspace = TileWorkspace.allocate(64 << 20, 1 << 15, "cuda")
    for config in CONFIGS:
        for count in (1, 13, 64, 300):
            out = torch.empty(count, matrix.out_features, device="cuda")
            packed_tiles(rows[:count], matrix, out, config, workspace)
            check(out, expected[:count], ROUNDING[dtype] if config.scales_first else 1e-4)
    gate, up = expected.chunk(2, -1)
    for count in (1, 2, 16, 33, 70, 140, 300):
        gated = packed_linear(rows[:count], PackedLinear(matrix), with_silu_mul=True)
        right = F.silu(gate[:count]) * up[:count]
        check(gated, right, 4 * ROUNDING[dtype])


@pytest.fixture(scope="module")
def tried() -> Iterator[dict[tuple[Any, ...], Future[None]]]:
    with tried_apart(check_layer, CASES) as outcomes:
        yield outcomes


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_layers(case: tuple[str, str, str], tried: dict[tuple[Any, ...], Future[None]]) -> None:
    tried[case].result()


def test_the_same_every_time_and_in_a_graph() -> None:
    torch.manual_seed(0)
    matrix = random_matrix("int8", 5120, 27648, 128, device="cuda")
    x = torch.randn(16, 27648, device="cuda").bfloat16()
    out = torch.empty(16, 5120, device="cuda").bfloat16()
    workspace = TileWorkspace.allocate(64 << 20, 1 << 14, "cuda")
    first = packed_tiles(x, matrix, out, CONFIGS[0], workspace).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed_tiles(x, matrix, out, CONFIGS[0], workspace)
    for _ in range(50):
        out.zero_()
        graph.replay()
        assert torch.equal(out, first)
