"""`firstlight models`: what the catalogue lists and what the cache holds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from handler.flags import CATALOGUE, DOWNLOAD_DIR, add_flags, collect
from handler.gpus import gpu_memories, main_memory
from handler.settings import cache_directory, read_catalogue
from runtime.catalogue import ModelSpec
from runtime.weights.sources import SourceError, locate

USAGE = "[FLAGS]"
DESCRIPTION = """\
List the models of models.yaml: how long a context each is served with, on how many GPUs, whether that
fits on this machine, where the model comes from, and whether it is in the cache. The default model has a
star. What fits is estimated from the `memory` of the entries: weights, and the cache for one request of
the whole length.
"""

EPILOG = """\
Models without an entry can be served too: by Hub id (org/name), path, s3://... or hf://...@revision.
"""

# Of a GPU's memory, what an engine takes by default, and what a step takes of that beside weights and cache.
_GPU_SHARE = 0.9
_WORKING_GB = 2.5
# Of a machine's memory, what may be left to a model.
_CPU_SHARE = 0.8
_FLAGS = (CATALOGUE, DOWNLOAD_DIR)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_flags(parser, "catalogue", _FLAGS)


def run(given: dict[str, Any]) -> int:
    """Print the table."""
    values = collect(given, _FLAGS)
    catalogue = read_catalogue(values)
    cache = Path(cache_directory(values))
    gpus, memory = gpu_memories(), main_memory()
    rows = [("  MODEL", "LENGTH", "GPUS", "FITS", "CACHED", "SOURCE")]
    for spec in catalogue.models.values():
        star = "*" if spec.id == catalogue.default else " "
        length = str(spec.max_model_len) if spec.max_model_len else "model's"
        fits = fits_gpus(spec, gpus) if gpus else fits_memory(spec, memory)
        rows.append((f"{star} {spec.id}", length, str(spec.tp_size), fits, _cached(spec, cache), spec.source))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def fits_gpus(spec: ModelSpec, gpus: Sequence[int]) -> str:
    """Whether a model fits on GPUs of so many bytes, and if not, why."""
    if "weights_gb" not in spec.memory:
        return "?"
    room = min(gpus) / 1e9 * _GPU_SHARE

    def needed(tp_size: int) -> float:
        return (spec.memory["weights_gb"] + _cache_gb(spec)) / tp_size + _WORKING_GB

    if len(gpus) < spec.tp_size:
        why = f"no: {spec.tp_size} GPUs with {needed(spec.tp_size):.0f} GB, here {len(gpus)}"
        return f"with --tensor-parallel-size {len(gpus)}" if needed(len(gpus)) <= room else why
    if needed(spec.tp_size) <= room:
        return "yes"
    return f"no: {needed(spec.tp_size):.0f} GB a GPU, here {room:.0f}"


def fits_memory(spec: ModelSpec, memory: int) -> str:
    """Whether a model fits into a CPU's memory of so many bytes, and if not, why."""
    weights = spec.memory.get("cpu_weights_gb", spec.memory.get("weights_gb"))
    if weights is None:
        return "?"
    # There, numbers in the cache have 32 bits.
    needed, room = weights + 2 * _cache_gb(spec), memory / 1e9 * _CPU_SHARE
    return "yes" if needed <= room else f"no: {needed:.0f} GB of memory, here {room:.0f}"


def _cache_gb(spec: ModelSpec) -> float:
    """What one request of the whole length takes of the cache."""
    length = spec.max_model_len or 0
    return length * spec.memory.get("kv_kib_per_token", 0.0) * 1024 / 1e9


def _cached(spec: ModelSpec, cache: Path) -> str:
    try:
        return "yes" if locate(spec, cache) is not None else "no"
    except SourceError:
        return "no"
