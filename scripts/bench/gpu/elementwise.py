"""Norms, activations, rotary embedding and token embedding at an 8B model's sizes, against reading and
writing what they must."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness.report import Report, progress
from harness.table import number

from gpu.limits import Limits
from gpu.timing import L2_FLUSHING_BYTES, replay_seconds
from runtime.kernels.gpu.activation import silu_mul
from runtime.kernels.gpu.embedding import embedding
from runtime.kernels.gpu.norm import add_rms_norm
from runtime.kernels.gpu.rotary import rotary_store

HIDDEN, INNER, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 4096, 14336, 32, 8, 128, 16
TOKENS = (1, 64, 256, 8192)
_MAX_COPIES = 32


@dataclass(frozen=True)
class Case:
    """What one launch does on its own copy of the data, and the bytes it cannot do without."""

    launch: Callable[[], object]
    bytes: int


def _bf16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def _norm(tokens: int) -> Case:
    x, residual, out = _bf16(3, tokens, HIDDEN)
    weight = _bf16(HIDDEN)
    return Case(lambda: add_rms_norm(x, residual, weight, 1e-5, out), 4 * 2 * tokens * HIDDEN)


def _activation(tokens: int) -> Case:
    gate_up, out = _bf16(tokens, 2 * INNER), _bf16(tokens, INNER)
    return Case(lambda: silu_mul(gate_up, out), 3 * 2 * tokens * INNER)


def _rotary(tokens: int) -> Case:
    qkv = _bf16(tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    keys, values = _bf16(2, tokens // BLOCK_SIZE + 1, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    positions = torch.arange(tokens, dtype=torch.int32, device="cuda")
    cos_sin = torch.randn(tokens, 2, HEAD_DIM // 2, device="cuda")
    size = 2 * tokens * HEAD_DIM * (2 * NUM_HEADS + 5 * NUM_KV_HEADS)
    return Case(
        lambda: rotary_store(qkv, cos_sin, positions, positions, keys, values, NUM_HEADS),
        size + tokens * HEAD_DIM * 4,
    )


def _embedding(tokens: int) -> Case:
    table, out = _bf16(32768, HIDDEN), _bf16(tokens, HIDDEN)
    ids = torch.randint(32768, (tokens,), dtype=torch.int32, device="cuda")
    return Case(lambda: embedding(ids, table, out), 2 * 2 * tokens * HIDDEN)


CASES = {
    "residual and norm": _norm,
    "SiLU and product": _activation,
    "rotary and store": _rotary,
    "embedding": _embedding,
}


def add_tables(report: Report, limits: Limits) -> None:
    lines, data = [], {}
    for (name, make), tokens in itertools.product(CASES.items(), TOKENS):
        progress(f"{name}, {tokens} tokens")
        first = make(tokens)
        copies = min(_MAX_COPIES, max(1, -(-L2_FLUSHING_BYTES // first.bytes)))
        cases = [first, *(make(tokens) for _ in range(copies - 1))]

        def step(cases: list[Case] = cases) -> None:
            for case in cases:
                case.launch()

        seconds = replay_seconds(step) / copies
        rate = first.bytes / seconds
        data[f"{name}, {tokens} tokens"] = {"seconds": seconds, "of_limit": rate / limits.read}
        lines.append(
            [
                name,
                str(tokens),
                number(seconds * 1e6),
                number(rate / 1e12),
                f"{100 * rate / limits.read:.0f} %",
            ]
        )
    report.data["elementwise"] = data
    report.add_table(
        "between the products; below a few µs it is the launch that counts",
        ["kernel", "tokens", "µs", "TB/s", "of limit"],
        lines,
    )
