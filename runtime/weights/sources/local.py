"""Models in a folder on this machine: used in place, never copied."""

from __future__ import annotations

from pathlib import Path

from runtime.weights.sources.errors import SourceError
from runtime.weights.sources.folder import check_model, holds_model
from runtime.weights.sources.reference import Reference


def locate(reference: Reference) -> Path | None:
    """The folder itself if it holds a whole model."""
    directory = Path(reference.location)
    return directory if holds_model(directory) else None


def fetch(reference: Reference) -> Path:
    """The folder itself. Raises SourceError (kind "not_found", "invalid") that says what is wrong."""
    directory = Path(reference.location)
    if not directory.exists():
        raise SourceError(
            "not_found",
            f"There is no {directory}. A path is meant from the current directory on; to name a model of the "
            "Hub, write org/name without a leading ./ or /.",
        )
    if not directory.is_dir():
        raise SourceError(
            "invalid",
            f"{directory} is a file. Point to the folder that holds config.json and the weights.",
        )
    try:
        check_model(directory)
    except OSError as error:
        raise SourceError("invalid", f"{directory} cannot be read: {error.strerror}.") from error
    return directory
