"""`firstlight models`: what the catalogue lists and what the cache holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from handler.flags import CATALOGUE, DOWNLOAD_DIR, add_flags, collect
from handler.settings import cache_directory, read_catalogue
from runtime.catalogue import ModelSpec
from runtime.weights.sources import SourceError, locate

USAGE = "[FLAGS]"
DESCRIPTION = """\
List the models of models.yaml: how long a context each is served with, on how many GPUs, where it comes
from, and whether it is in the cache. The default model has a star.
"""

EPILOG = """\
Models without an entry can be served too: by Hub id (org/name), path, s3://... or hf://...@revision.
"""

_FLAGS = (CATALOGUE, DOWNLOAD_DIR)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_flags(parser, "catalogue", _FLAGS)


def run(given: dict[str, Any]) -> int:
    """Print the table."""
    values = collect(given, _FLAGS)
    catalogue = read_catalogue(values)
    cache = Path(cache_directory(values))
    rows = [("  MODEL", "LENGTH", "GPUS", "CACHED", "SOURCE")]
    for spec in catalogue.models.values():
        star = "*" if spec.id == catalogue.default else " "
        length = str(spec.max_model_len) if spec.max_model_len else "model's"
        rows.append((f"{star} {spec.id}", length, str(spec.tp_size), _cached(spec, cache), spec.source))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _cached(spec: ModelSpec, cache: Path) -> str:
    try:
        return "yes" if locate(spec, cache) is not None else "no"
    except SourceError:
        return "no"
