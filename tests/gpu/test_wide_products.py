"""Gate and up projections of dozens of rows at the shapes of real models, against products in double
precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from runtime.kernels.gpu.hopper.product import WideProduct, fits, suits
from runtime.kernels.linear import LinearWeights, silu_linear

pytestmark = pytest.mark.gpu
if torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("these kernels are Hopper's", allow_module_level=True)

LAYERS = {
    "Llama-3-8B": (28672, 4096),
    "Llama-2-7B": (22016, 4096),
    "Qwen2.5-14B": (27648, 5120),
    "Baichuan-13B": (27392, 5120),
    "Llama-3-70B on one of four GPUs": (14336, 8192),
}
ROWS = [33, 64, 77, 96, 128, 150, 192, 200, 256]


def matrix(layer: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    torch.manual_seed(0)
    out_features, in_features = LAYERS[layer]
    return (torch.randn(out_features, in_features, device="cuda") / in_features**0.5).to(dtype)


def rows_for(weight: torch.Tensor, m: int) -> torch.Tensor:
    return torch.randn(m, weight.shape[1], device="cuda").to(weight.dtype)


def room_for(weight: torch.Tensor, m: int) -> torch.Tensor:
    return torch.full((m, weight.shape[0] // 2), torch.nan, device="cuda", dtype=weight.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer: str, dtype: torch.dtype) -> None:
    weight = matrix(layer, dtype)
    assert suits(weight)
    product = WideProduct(weight)
    rows = rows_for(weight, max(ROWS))
    gates, ups = torch.cat([rows.double() @ part.double().T for part in weight.split(4096)], dim=-1).chunk(
        2, dim=-1
    )
    wanted = F.silu(gates) * ups
    # What rounding to the nearest number of 16 bits may change; tensor cores do not add up exactly either.
    rounding = torch.finfo(dtype).eps / 2
    for m in ROWS:
        out = product(rows[:m], room_for(weight, m))
        torch.testing.assert_close(out.double(), wanted[:m], atol=2e-3, rtol=1.01 * rounding)


def test_rows_do_not_depend_on_how_many_there_are_nor_on_when() -> None:
    weight = matrix("Llama-3-8B")
    product = WideProduct(weight)
    rows = rows_for(weight, 256)
    whole = product(rows, room_for(weight, 256))
    for m in (256, 33, 64, 100, 255, 256):
        for _ in range(20):
            assert torch.equal(product(rows[:m], room_for(weight, m)), whole[:m])


def test_nothing_is_written_past_the_last_row() -> None:
    weight = matrix("Llama-3-8B")
    room = room_for(weight, 256)
    WideProduct(weight)(rows_for(weight, 101), room[:101])
    assert room[101:].isnan().all()
    assert not room[:101].isnan().any()


def test_in_a_graph() -> None:
    weights = LinearWeights([matrix("Llama-3-8B")])
    x = rows_for(weights.weights[0], 70)
    eager = silu_linear(x, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = silu_linear(x, weights)
    for _ in range(3):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, eager)


def test_what_does_not_fit() -> None:
    def of(out_features: int, in_features: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(out_features, in_features, dtype=dtype, device="cuda")

    assert fits(of(28672, 4096))
    assert not fits(of(28672, 4096, torch.float32))
    assert not fits(of(8192, 4096))
    assert not fits(of(28672 + 128, 4096))
    assert not fits(of(28672, 4096 - 32))
