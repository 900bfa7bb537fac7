"""Products with quantised weights at the shapes of Qwen2.5-32B, against the speed of memory and against what
torch takes for the same product with weights of 16 bits."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from harness.report import Report, progress
from harness.table import number

from gpu.limits import Limits
from gpu.products import Layer
from gpu.timing import replay_seconds
from runtime.kernels.packed import PackedMatrix, in_blocks, in_order, pack_words
from runtime.kernels.packed_linear import PackedLinear, packed_linear

ROWS = (1, 2, 8, 16, 64, 128, 256, 512)
LAYERS = (
    Layer("qkv", 7168, 5120),
    Layer("output", 5120, 5120),
    Layer("gate and up", 55296, 5120, gated=True),
    Layer("down", 5120, 27648),
)
KINDS = ("int8", "int4", "fp8")
_GROUP = 128
# More than the L2 cache holds.
_POOL_BYTES = 300 << 20


def matrices(kind: str, layer: Layer) -> list[PackedMatrix]:
    """So many random ones that none is found in the L2 cache."""
    bits = {"int8": 8, "int4": 4, "fp8": 0}[kind]
    count = max(2, -(-_POOL_BYTES // (layer.outputs * layer.inputs * (bits or 8) // 8)))
    return [_matrix(bits, layer) for _ in range(count)]


def _matrix(bits: int, layer: Layer) -> PackedMatrix:
    shape = layer.outputs, layer.inputs
    groups = 1 if bits == 0 else layer.inputs // _GROUP
    scales = torch.full((groups, layer.outputs), 1e-3, device="cuda")
    if bits == 0:
        values = torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)
        return PackedMatrix(values, scales, None, layer.inputs, layer.inputs)
    integers = torch.randint(1 << bits, shape, dtype=torch.uint8, device="cuda")
    values = in_blocks(pack_words(integers, bits, 64), bits, 64).contiguous()
    return PackedMatrix(values, in_order(scales.half(), bits), None, layer.inputs, _GROUP, bits, 64)


def _ours(layer: Layer, rows: int, weights: list[PackedMatrix]) -> float:
    """Seconds of a product by this project's kernels."""
    x = torch.randn(rows, layer.inputs, device="cuda").bfloat16()

    def step() -> None:
        for weight in weights:
            packed_linear(x, PackedLinear(weight), layer.gated)

    return replay_seconds(step) / len(weights)


def _torchs(layer: Layer, rows: int) -> float:
    """Seconds of the same product with weights of 16 bits, by torch; these are larger than the L2 cache or
    nearly so."""
    x = torch.randn(rows, layer.inputs, device="cuda").bfloat16()
    weight = torch.empty(layer.outputs, layer.inputs, dtype=torch.bfloat16, device="cuda").normal_()
    return replay_seconds(partial(F.linear, x, weight))


def add_tables(report: Report, limits: Limits) -> None:
    """A row for each layer, format and number of rows."""
    table, data = [], {}
    for layer in LAYERS:
        torchs = {rows: _torchs(layer, rows) for rows in ROWS}
        for kind in KINDS:
            progress(f"{kind}, {layer.name}")
            weights = matrices(kind, layer)
            size = weights[0].values.nbytes + weights[0].scales.nbytes
            for rows in ROWS:
                ours = _ours(layer, rows, weights)
                limit = max(size / limits.read, 2 * rows * layer.outputs * layer.inputs / limits.product)
                data[f"{kind}, {layer.name}, {rows} rows"] = {
                    "seconds": ours,
                    "of_limit": limit / ours,
                    "torch_seconds": torchs[rows],
                }
                cells = number(ours * 1e6), f"{100 * limit / ours:.0f} %", number(torchs[rows] * 1e6)
                table.append([f"{layer.name}, {kind}", str(rows), *cells])
    report.data["packed products"] = data
    report.add_table(
        "products with quantised weights; the limit is reading them, or multiplying",
        ["layer, format", "rows", "µs", "of limit", "torch with 16 bits, µs"],
        table,
    )
