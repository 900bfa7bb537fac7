"""Products of few and of dozens of rows with the weights of an 8B model's layers, against the speed of memory
and of multiplication and against torch's own (cuBLAS)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from harness.report import Report, progress
from harness.table import number
from triton.runtime.errors import OutOfResources

from gpu.limits import Limits
from gpu.timing import L2_FLUSHING_BYTES, replay_seconds
from runtime.kernels.gpu.activation import silu_mul
from runtime.kernels.gpu.gemv import GemvConfig, gemv, gemv_config
from runtime.kernels.linear import LinearWeights, silu_linear

ROWS = (1, 2, 4, 8, 16)
WIDE_ROWS = (64, 96, 128, 160, 192, 224, 256)
_POOL_ELEMENTS = 1 << 30


@dataclass(frozen=True)
class Layer:
    """Weights [outputs, inputs]; gated ones are the gate and up projections with SiLU after them."""

    name: str
    outputs: int
    inputs: int
    gated: bool = False

    @property
    def bytes(self) -> int:
        return 2 * self.outputs * self.inputs


LAYERS = (
    Layer("qkv", 6144, 4096),
    Layer("output", 4096, 4096),
    Layer("gate and up", 28672, 4096, gated=True),
    Layer("down", 4096, 14336),
    Layer("head", 128256, 4096),
)
SWEPT_ROWS = (1, 8)
CONFIGS = {
    1: [
        GemvConfig(*parts)
        for parts in (
            *((1, 2048, 4, 1), (2, 1024, 4, 1), (2, 2048, 4, 1), (2, 2048, 8, 1), (2, 4096, 8, 1)),
            *((4, 512, 2, 1), (4, 1024, 4, 1), (4, 2048, 4, 1), (4, 2048, 8, 1), (8, 512, 4, 1)),
        )
    ],
    8: [
        GemvConfig(*parts)
        for parts in (
            *((16, 256, 4, 5), (16, 512, 4, 3), (16, 512, 4, 4), (32, 128, 4, 6), (32, 256, 4, 3)),
            *((32, 256, 4, 4), (32, 256, 8, 4), (32, 512, 8, 3), (64, 128, 4, 4), (64, 128, 4, 5)),
            *((64, 256, 4, 3), (128, 128, 4, 4)),
        )
    ],
}


class Pool:
    """Weights of many layers, one after the other in memory, so that none is found in the L2 cache."""

    def __init__(self) -> None:
        self._weights = torch.empty(_POOL_ELEMENTS, dtype=torch.bfloat16, device="cuda").normal_()

    def weights(self, layer: Layer) -> list[torch.Tensor]:
        size = layer.outputs * layer.inputs
        count = min(max(1, -(-L2_FLUSHING_BYTES // layer.bytes)), _POOL_ELEMENTS // size)
        return [
            self._weights[index * size :][:size].view(layer.outputs, layer.inputs) for index in range(count)
        ]


def _seconds(weights: list[torch.Tensor], multiply: Callable[[torch.Tensor], object]) -> float:
    def step() -> None:
        for weight in weights:
            multiply(weight)

    return replay_seconds(step) / len(weights)


def _ours(layer: Layer, rows: int, weights: list[torch.Tensor], config: GemvConfig | None = None) -> float:
    """Infinite where the tiles do not fit into shared memory."""
    x = torch.randn(rows, layer.inputs, device="cuda").bfloat16()
    out = torch.empty(rows, layer.outputs // (2 if layer.gated else 1), device="cuda").bfloat16()
    try:
        return _seconds(weights, lambda weight: gemv(x, weight, out, silu_mul=layer.gated, config=config))
    except OutOfResources:
        return math.inf


def _torchs(layer: Layer, rows: int, weights: list[torch.Tensor]) -> float:
    x = torch.randn(rows, layer.inputs, device="cuda").bfloat16()
    out = torch.empty(rows, layer.outputs // 2, device="cuda").bfloat16()
    if layer.gated:
        return _seconds(weights, lambda weight: silu_mul(F.linear(x, weight), out))
    return _seconds(weights, partial(F.linear, x))


def add_tables(report: Report, limits: Limits) -> None:
    pool = Pool()
    table, data = [], {}
    for layer, rows in itertools.product(LAYERS, ROWS):
        progress(f"{layer.name}, {rows} rows")
        weights = pool.weights(layer)
        ours, torchs = _ours(layer, rows, weights), _torchs(layer, rows, weights)
        share = layer.bytes / ours / limits.read
        data[f"{layer.name}, {rows} rows"] = {"seconds": ours, "of_limit": share, "torch_seconds": torchs}
        cells = (number(ours * 1e6), number(layer.bytes / ours / 1e12), f"{100 * share:.0f} %")
        table.append([layer.name, str(rows), *cells, number(torchs * 1e6), number(torchs / ours)])
    report.data["products"] = data
    report.add_table(
        "products of few rows; gate and up with SiLU after them",
        ["layer", "rows", "µs", "TB/s", "of limit", "torch, µs", "times torch"],
        table,
    )


def add_wide_table(report: Report, limits: Limits) -> None:
    """Gate and up projections of dozens of rows as the engine computes them."""
    (layer,) = (layer for layer in LAYERS if layer.gated)
    weights = Pool().weights(layer)
    table, data = [], {}
    for rows in WIDE_ROWS:
        progress(f"{layer.name}, {rows} rows")
        ours, torchs = _engines(layer, rows, weights), _torchs(layer, rows, weights)
        operations = 2 * rows * layer.outputs * layer.inputs
        limit = max(layer.bytes / limits.read, operations / limits.product)
        data[f"{layer.name}, {rows} rows"] = {"seconds": ours, "limit": limit, "torch_seconds": torchs}
        cells = (number(ours * 1e6), number(operations / ours / 1e12), f"{100 * limit / ours:.0f} %")
        table.append([str(rows), *cells, number(torchs * 1e6), number(torchs / ours)])
    report.data["wide products"] = data
    report.add_table(
        "gate and up of dozens of rows, with SiLU after them",
        ["rows", "µs", "TFLOP/s", "of limit", "torch, µs", "times torch"],
        table,
    )


def _engines(layer: Layer, rows: int, weights: list[torch.Tensor]) -> float:
    x = torch.randn(rows, layer.inputs, device="cuda").bfloat16()
    known = {weight.data_ptr(): LinearWeights([weight]) for weight in weights}
    return _seconds(weights, lambda weight: silu_linear(x, known[weight.data_ptr()]))


def add_sweep(report: Report, limits: Limits) -> None:
    """The time of every layer in every way of computing it, and what the kernels' own table should say."""
    pool = Pool()
    for rows in SWEPT_ROWS:
        found: dict[GemvConfig, list[float]] = {}
        for config in CONFIGS[rows]:
            progress(f"{rows} rows: {config}")
            found[config] = [_ours(layer, rows, pool.weights(layer), config) for layer in LAYERS]
        limit = [layer.bytes / limits.read for layer in LAYERS]
        lines = [["limit", *(number(seconds * 1e6) for seconds in limit)]]
        for config, times in found.items():
            lines.append([_label(config), *(number(seconds * 1e6) for seconds in times)])
        report.add_table(
            f"products of {rows} rows, µs: block_n, block_k, warps, stages",
            ["", *(layer.name for layer in LAYERS)],
            lines,
        )
        for place, layer in enumerate(LAYERS):
            best = min(found, key=lambda config, place=place: found[config][place])
            now = found.get(gemv_config(layer.outputs, layer.inputs, rows, layer.gated), found[best])[place]
            report.add_note(
                f"({layer.outputs}, {layer.inputs}, {rows == 1}): {best},"
                f"  # {layer.name}: {100 * limit[place] / found[best][place]:.0f} % of the limit,"
                f" now {100 * limit[place] / now:.0f} %"
            )
        report.data[f"products of {rows} rows, swept"] = {
            _label(config): dict(zip([layer.name for layer in LAYERS], times, strict=True))
            for config, times in found.items()
        }


def _label(config: GemvConfig) -> str:
    return f"{config.block_n}, {config.block_k}, {config.num_warps}, {config.num_stages}"
