"""Which tile sizes, warps, stages and splits are fastest: what the kernels' own tables are chosen from."""

from __future__ import annotations

import itertools
from functools import partial

from harness.report import Report, progress
from harness.table import number
from triton.runtime.errors import OutOfResources

from gpu.attention_cases import DecodeCase, Pool, PrefillCase, ragged
from gpu.limits import Limits
from gpu.timing import replay_seconds
from runtime.kernels.gpu.attention_decode import DecodeConfig
from runtime.kernels.gpu.attention_prefill import PrefillConfig

DECODES = {
    "64 x 2000": [2000] * 64,
    "256 ragged": ragged(256),
    "64 ragged": ragged(64),
    "8 x 2000": [2000] * 8,
    "1 x 2000": [2000],
    "1 x 128": [128],
}
SPLITS = (1, 2, 3, 4, 6, 8, 16, 32, 64)
PREFILLS = {"1 x 8000": (1, 8000, 0), "16 x 2000": (16, 2000, 0), "1 x 512 over 7500": (1, 512, 7500)}
DECODE_CONFIGS = [
    DecodeConfig(*parts)
    for parts in itertools.product((32, 64, 128), (2, 4, 8), (2, 3, 4))
    if parts[0] * parts[2] <= 384 and (parts[0] > 32 or parts[1] < 8)
]
PREFILL_CONFIGS = [
    PrefillConfig(*parts)
    for parts in (
        *((128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4)),
        *((128, 64, 4, 2), (128, 64, 4, 3), (128, 32, 4, 3), (128, 32, 4, 4)),
        *((256, 32, 8, 3), (64, 64, 4, 3), (64, 128, 4, 2), (64, 32, 4, 4)),
    )
]


def add_tables(report: Report, limits: Limits, block_sizes: list[int]) -> None:
    pool = Pool()
    for block_size in block_sizes:
        _decode(report, limits, pool, block_size)
        _prefill(report, limits, pool, block_size)


def _decode(report: Report, limits: Limits, pool: Pool, block_size: int) -> None:
    cases = [DecodeCase(name, seq_lens, pool, block_size) for name, seq_lens in DECODES.items()]
    found: dict[str, dict[str, float]] = {}
    for config in DECODE_CONFIGS:
        progress(f"blocks of {block_size}: {config}")
        try:
            found[_label(config)] = {
                case.name: _microseconds(case, case.default_splits(), config) for case in cases
            }
        except OutOfResources:
            continue
    best = DECODE_CONFIGS[[_label(config) for config in DECODE_CONFIGS].index(_fastest(found, "64 x 2000"))]
    splits = {
        f"{_label(best)}, {count} splits": {case.name: _microseconds(case, count, best) for case in cases}
        for count in SPLITS
    }
    floor = {case.name: case.bytes / limits.read * 1e6 for case in cases}
    _add(report, f"decode sweep, blocks of {block_size}, µs", {"limit": floor, **found, **splits})


def _microseconds(case: DecodeCase, splits: int, config: DecodeConfig) -> float:
    return replay_seconds(lambda: case.step(splits, config)) / case.layers * 1e6


def _prefill(report: Report, limits: Limits, pool: Pool, block_size: int) -> None:
    cases = [PrefillCase(name, *sizes, pool, block_size) for name, sizes in PREFILLS.items()]
    found: dict[str, dict[str, float]] = {}
    for config in PREFILL_CONFIGS:
        progress(f"blocks of {block_size}: {config}")
        try:
            found[_label(config)] = {
                case.name: replay_seconds(partial(case.step, config)) * 1e6 for case in cases
            }
        except OutOfResources:
            continue
    floor = {case.name: case.operations / limits.product * 1e6 for case in cases}
    _add(report, f"prefill sweep, blocks of {block_size}, µs", {"limit": floor, **found})


def _label(config: DecodeConfig | PrefillConfig) -> str:
    tile = [str(config.block_m)] if isinstance(config, PrefillConfig) else []
    return f"{' x '.join([*tile, str(config.block_n)])}, {config.num_warps} warps, {config.num_stages} stages"


def _fastest(found: dict[str, dict[str, float]], case: str) -> str:
    return min(found, key=lambda label: found[label][case])


def _add(report: Report, title: str, found: dict[str, dict[str, float]]) -> None:
    names = list(found["limit"])
    rows = [[label, *(number(times[name]) for name in names)] for label, times in found.items()]
    best = {label: times for label, times in found.items() if label != "limit"}
    report.add_table(title, ["", *names], rows)
    report.add_note("\n".join(f"fastest at {name}: {_fastest(best, name)}" for name in names))
    report.data[title] = found
