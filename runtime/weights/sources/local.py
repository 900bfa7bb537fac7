"""Models in a folder on this machine: used in place, never copied, unless their weights are pickled."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from runtime.weights.sources.cache import Entry, explained
from runtime.weights.sources.errors import SourceError
from runtime.weights.sources.folder import weights_in
from runtime.weights.sources.pickles import convert_into
from runtime.weights.sources.progress import FetchProgress
from runtime.weights.sources.reference import Reference
from runtime.weights.sources.selection import is_pickled, is_small


def locate(reference: Reference, cache_dir: Path) -> Path | None:
    """The folder itself if it holds a whole model; of pickled weights, what they were converted to."""
    directory = Path(reference.location)
    try:
        weights = weights_in(directory)
    except (SourceError, OSError):
        return None
    if not is_pickled(weights[0]):
        return directory
    entry = _entry(directory, weights, cache_dir)
    return entry.directory if entry.complete() else None


def fetch(reference: Reference, cache_dir: Path, on_progress: Callable[[FetchProgress], None]) -> Path:
    """The folder itself; of pickled weights, a converted copy.

    Raises SourceError (kind "not_found", "invalid") that says what is wrong.
    """
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
        weights = weights_in(directory)
    except OSError as error:
        raise SourceError("invalid", f"{directory} cannot be read: {error.strerror}.") from error
    if not is_pickled(weights[0]):
        return directory
    return _converted(directory, weights, _entry(directory, weights, cache_dir), on_progress)


def _entry(directory: Path, weights: list[str], cache_dir: Path) -> Entry:
    """The place of the converted model: another one whenever a file of the folder changes."""
    names = sorted(name for name in os.listdir(directory) if is_small(name) or name in weights)
    stats = [(name, (directory / name).stat()) for name in names]
    seen = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
    where = hashlib.sha256(str(directory).encode()).hexdigest()[:12]
    version = hashlib.sha256(seen.encode()).hexdigest()[:40]
    return Entry(cache_dir, "local", f"{directory.name[-80:]}-{where}", version)


def _converted(
    directory: Path, weights: list[str], entry: Entry, on_progress: Callable[[FetchProgress], None]
) -> Path:
    def waiting() -> None:
        on_progress(FetchProgress(bytes_done=0, bytes_total=0, phase="convert"))

    with explained(entry.model_dir), entry.locked(waiting):
        if not entry.complete():
            entry.sweep()
            entry.directory.mkdir(parents=True, exist_ok=True)
            entry.partial.mkdir(exist_ok=True)
            small = {name: 0 for name in os.listdir(directory) if is_small(name)}
            for name in small:
                small[name] = shutil.copyfile(directory / name, entry.directory / name).stat().st_size
            made = convert_into(entry, directory, weights, on_progress)
            entry.publish(str(directory), small | made)
    return entry.directory
