"""Whether a folder on this machine holds a whole model."""

from __future__ import annotations

import os
from pathlib import Path

from runtime.weights.sources.errors import SourceError
from runtime.weights.sources.selection import SAFETENSORS_INDEX, is_pickled, require_config, weight_files


def weights_in(directory: Path) -> list[str]:
    """The files with the weights. Raises SourceError (kind "invalid") unless config and weights are whole."""
    # A dangling link, as an interrupted download of the Hub's client may leave, is no file.
    names = {name for name in os.listdir(directory) if (directory / name).is_file()}
    require_config(names, str(directory))
    index = (directory / SAFETENSORS_INDEX).read_bytes() if SAFETENSORS_INDEX in names else None
    return weight_files(names, index, str(directory))


def holds_model(directory: Path) -> bool:
    """Whether the folder is a whole model of safetensors."""
    try:
        weights = weights_in(directory)
    except (SourceError, OSError):
        return False
    return not is_pickled(weights[0])
