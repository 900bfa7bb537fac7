"""Products with quantised weights at the shapes of real models' layers, against float32 products of the
weights that they mean."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from runtime.kernels.gpu.packed_dequantize import dequantize
from runtime.kernels.gpu.packed_gemv import packed_gemv
from runtime.kernels.gpu.packed_tiles import TileConfig, TileWorkspace, packed_tiles
from runtime.kernels.packed import dequantize_torch
from tests.runtime.kernels.packed_matrices import random_matrix

pytestmark = pytest.mark.gpu
LAYERS = {
    "Qwen2.5-32B's output": (5120, 5120),
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
CONFIGS = [TileConfig(16, 64, 4, 4, 4), TileConfig(64, 64, 2, 4, 3), TileConfig(128, 128, 1, 8, 3, True)]


@pytest.mark.parametrize(
    ("layer", "format", "dtype"),
    [
        *((layer, "int8", torch.float16) for layer in LAYERS),
        *(("Qwen2.5-0.5B's down", format, torch.bfloat16) for format in FORMATS),
        ("Qwen2.5-0.5B's down", "int4 with zeros", torch.float16),
    ],
)
def test_layers(layer: str, format: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
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
    check(
        packed_gemv(rows[:1], matrix, torch.empty_like(expected[:1], dtype=torch.float32)), expected[:1], 1e-4
    )
    gate, up = expected[:1].chunk(2, -1)
    gated = torch.empty(1, gate.shape[1], device="cuda")
    packed_gemv(rows[:1], matrix, gated, silu_mul=True)
    torch.testing.assert_close(gated.double(), F.silu(gate) * up, atol=1e-3, rtol=1e-3)
    workspace = TileWorkspace.allocate(64 << 20, 1 << 14, "cuda")
    for config in CONFIGS:
        for count in (1, 13, 64, 300):
            out = torch.empty(count, matrix.out_features, device="cuda")
            packed_tiles(rows[:count], matrix, out, config, workspace)
            # Scales that come first round each weight to the width of the rows.
            rounding = {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype] if config.scales_first else 1e-4
            check(out, expected[:count], rounding)


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
