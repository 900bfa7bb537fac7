"""Whether a folder on this machine holds a whole model."""

from __future__ import annotations

import os
from pathlib import Path

from runtime.weights.sources.errors import SourceError
from runtime.weights.sources.selection import SAFETENSORS_INDEX, require_config, weight_files


def check_model(directory: Path) -> None:
    """Raise SourceError (kind "invalid") unless the folder has a config and all its weights."""
    # A dangling link, as an interrupted download of the Hub's client may leave, is no file.
    names = {name for name in os.listdir(directory) if (directory / name).is_file()}
    require_config(names, str(directory))
    index = (directory / SAFETENSORS_INDEX).read_bytes() if SAFETENSORS_INDEX in names else None
    weight_files(names, index, str(directory))


def holds_model(directory: Path) -> bool:
    """Whether `check_model` finds nothing wrong."""
    try:
        check_model(directory)
    except (SourceError, OSError):
        return False
    return True
