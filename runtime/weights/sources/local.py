"""Models on this machine: a folder is used in place, never copied, unless it has to be converted."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from runtime.weights.sources.cache import Entry, explained, require_space
from runtime.weights.sources.errors import SourceError
from runtime.weights.sources.folder import weights_in
from runtime.weights.sources.ggufs import CONVERSION, gguf_of, publish_converted
from runtime.weights.sources.pickles import convert_into
from runtime.weights.sources.progress import FetchProgress
from runtime.weights.sources.reference import Reference
from runtime.weights.sources.selection import is_pickled, is_small

OnProgress = Callable[[FetchProgress], None]


def locate(reference: Reference, cache_dir: Path) -> Path | None:
    """The folder itself if it holds a whole model; of other weights, what they were converted to."""
    path = Path(reference.location)
    try:
        if (gguf := gguf_of(path)) is not None:
            entry = _gguf_entry(gguf, cache_dir)
        else:
            weights = weights_in(path)
            if not is_pickled(weights[0]):
                return path
            entry = _entry(path, weights, cache_dir)
    except (SourceError, OSError):
        return None
    return entry.directory if entry.complete() else None


def fetch(reference: Reference, cache_dir: Path, on_progress: OnProgress) -> Path:
    """The folder itself; of pickled weights or a GGUF file, a converted copy.

    Raises SourceError (kind "not_found", "invalid") that says what is wrong.
    """
    directory = Path(reference.location)
    if not directory.exists():
        raise SourceError(
            "not_found",
            f"There is no {directory}. A path is meant from the current directory on; to name a model of the "
            "Hub, write org/name without a leading ./ or /.",
        )
    if (gguf := gguf_of(directory)) is not None:
        return _converted_gguf(gguf, _gguf_entry(gguf, cache_dir), on_progress)
    if not directory.is_dir():
        raise SourceError(
            "invalid",
            f"{directory} is a file. Point to the folder that holds config.json and the weights, or to a "
            "GGUF file.",
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
    return Entry(cache_dir, "local", _name(directory), _version([directory / name for name in names]))


def _gguf_entry(gguf: Path, cache_dir: Path) -> Entry:
    return Entry(cache_dir, "local", _name(gguf), f"{_version([gguf])}-{CONVERSION}")


def _name(path: Path) -> str:
    return f"{path.name[-80:]}-{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"


def _version(files: list[Path]) -> str:
    stats = [(file.name, file.stat()) for file in files]
    seen = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
    return hashlib.sha256(seen.encode()).hexdigest()[:40]


def _waiting(on_progress: OnProgress) -> Callable[[], None]:
    return lambda: on_progress(FetchProgress(bytes_done=0, bytes_total=0, phase="convert"))


def _converted_gguf(gguf: Path, entry: Entry, on_progress: OnProgress) -> Path:
    with explained(entry.model_dir), entry.locked(_waiting(on_progress)):
        if not entry.complete():
            entry.sweep()
            entry.partial.mkdir(exist_ok=True)
            require_space(entry.partial, gguf.stat().st_size)
            publish_converted(entry, gguf, str(gguf), on_progress)
    return entry.directory


def _converted(directory: Path, weights: list[str], entry: Entry, on_progress: OnProgress) -> Path:
    with explained(entry.model_dir), entry.locked(_waiting(on_progress)):
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
