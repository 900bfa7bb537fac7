"""`firstlight pull MODEL`: bring a model's files into the cache."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from handler.flags import CATALOGUE, DOWNLOAD_DIR, MODEL, REVISION, add_flags, add_model, collect, with_model
from handler.settings import cache_directory, model_spec
from runtime.weights.sources import ProgressBar, fetch
from runtime.weights.sources.cache import persist

USAGE = "[MODEL] [FLAGS]"
DESCRIPTION = """\
Fetch a model into the cache, so that a later start need not. Only the files that are needed are fetched,
an interrupted fetch goes on where it stopped, and what came is verified.
Prints the folder that the model is in.
"""

EPILOG = """\
examples:
  firstlight pull                                  the default model
  firstlight pull meta-llama/Meta-Llama-3-8B-Instruct
  firstlight pull hf://Qwen/Qwen2.5-0.5B-Instruct@main --download-dir /models

For gated models of the Hub set HF_TOKEN; for S3 the usual AWS_ variables.
"""

_FLAGS = (MODEL, CATALOGUE, DOWNLOAD_DIR, REVISION)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_model(parser)
    add_flags(parser, "model", _FLAGS)


def run(given: dict[str, Any]) -> int:
    """Fetch the model and print its folder."""
    values = collect(with_model(given), _FLAGS)
    spec = model_spec(values)
    with ProgressBar(spec.id) as bar:
        directory = fetch(spec, Path(cache_directory(values)), bar)
    persist(directory)
    print(directory)
    return 0
