"""Attention over the paged cache: decode against the speed of memory, prefill against a bf16 matrix
product and against torch's fastest `scaled_dot_product_attention` on contiguous keys and values."""

from __future__ import annotations

from functools import cache, partial

import torch
import torch.nn.functional as F
from harness.report import Report, progress
from harness.table import number
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from gpu.attention_cases import HEAD_DIM, NUM_HEADS, SCALE, DecodeCase, Pool, PrefillCase, ragged
from gpu.limits import Limits
from gpu.timing import replay_seconds

BATCHES, CONTEXTS = (1, 8, 64, 256), (128, 2000, 8000)
PREFILLS = {
    "1 x 8000": (1, 8000, 0),
    "16 x 2000": (16, 2000, 0),
    "1 x 512 over 7500": (1, 512, 7500),
    "1 x 16 over 7500": (1, 16, 7500),
}
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def add_tables(report: Report, limits: Limits, block_sizes: list[int]) -> None:
    pool = Pool()
    for block_size in block_sizes:
        progress(f"decode attention, blocks of {block_size}")
        _decode(report, limits, pool, block_size)
    for block_size in block_sizes:
        progress(f"prefill attention, blocks of {block_size}")
        _prefill(report, limits, pool, block_size)


def decode_cases(pool: Pool, block_size: int) -> list[DecodeCase]:
    lengths = {f"{batch} x {context}": [context] * batch for batch in BATCHES for context in CONTEXTS}
    lengths["256 ragged"] = ragged(256)
    lengths["64 ragged"] = ragged(64)
    return [DecodeCase(name, seq_lens, pool, block_size) for name, seq_lens in lengths.items()]


def _decode(report: Report, limits: Limits, pool: Pool, block_size: int) -> None:
    rows, data = [], {}
    for case in decode_cases(pool, block_size):
        splits = case.default_splits()
        seconds = replay_seconds(partial(case.step, splits)) / case.layers
        rate = case.bytes / seconds
        data[case.name] = {"seconds": seconds, "bytes_per_s": rate, "of_limit": rate / limits.read}
        rows.append(
            [
                case.name,
                str(splits),
                number(seconds * 1e6),
                number(rate / 1e12),
                f"{100 * rate / limits.read:.0f} %",
            ]
        )
    report.data[f"decode attention, blocks of {block_size}"] = data
    report.add_table(
        f"decode attention, blocks of {block_size}", ["sequences", "splits", "µs", "TB/s", "of limit"], rows
    )


def _prefill(report: Report, limits: Limits, pool: Pool, block_size: int) -> None:
    rows, data = [], {}
    for name, (count, new, history) in PREFILLS.items():
        case = PrefillCase(name, count, new, history, pool, block_size)
        seconds = replay_seconds(case.step)
        rate = case.operations / seconds
        peer, backend = _torch_seconds(count, new, history)
        data[name] = {
            "seconds": seconds,
            "operations_per_s": rate,
            "of_limit": rate / limits.product,
            "sdpa_seconds": peer,
            "sdpa_backend": backend,
        }
        rows.append(
            [
                name,
                number(seconds * 1e6),
                number(rate / 1e12),
                f"{100 * rate / limits.product:.0f} %",
                number(peer * 1e6),
                number(peer / seconds),
                backend,
            ]
        )
    report.data[f"prefill attention, blocks of {block_size}"] = data
    report.add_table(
        f"prefill attention, blocks of {block_size}",
        ["new tokens", "µs", "TFLOP/s", "of limit", "SDPA, µs", "times SDPA", "its backend"],
        rows,
    )


@cache
def _torch_seconds(count: int, new: int, history: int) -> tuple[float, str]:
    """The fastest backend's time for the same attention, keys and values repeated for every head."""
    q, k, v = (
        torch.randn(count, NUM_HEADS, length, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        for length in (new, new + history, new + history)
    )
    mask = causal_lower_right(new, new + history) if history else None
    found: list[tuple[float, str]] = []
    for backend in BACKENDS:
        try:
            with sdpa_kernel(backend):
                seconds = replay_seconds(
                    lambda: F.scaled_dot_product_attention(
                        q, k, v, attn_mask=mask, is_causal=mask is None, scale=SCALE
                    )
                )
        except RuntimeError:  # this backend does not do this case
            continue
        found.append((seconds, backend.name.removesuffix("_ATTENTION").lower()))
    return min(found)
