"""Models that come as one GGUF file: converted once, into the cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from runtime.weights.sources.cache import Entry
from runtime.weights.sources.errors import SourceError
from runtime.weights.sources.progress import FetchProgress

# Raised whenever the conversion writes something else than before, so that no old result is used.
CONVERSION = 1


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that a path on this machine means: itself, or the one in a folder without a config.json.

    Raises SourceError (kind "invalid") if the folder holds several.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    found = sorted(path.glob("*.gguf"))
    if not found or (path / "config.json").exists():
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise SourceError("invalid", f"{path} holds several GGUF files ({names}). Name one: {found[0]}")
    return found[0]


def publish_converted(
    entry: Entry, gguf: Path, source: str, on_progress: Callable[[FetchProgress], None]
) -> None:
    """Convert the file and make the result the entry's, which is locked and has its partial folder."""
    from runtime.weights.convert import convert_gguf

    out_dir = entry.partial / "converted"
    # What a killed conversion left is worth nothing.
    shutil.rmtree(out_dir, ignore_errors=True)
    out_dir.mkdir()
    convert_gguf(
        gguf,
        out_dir,
        lambda done, total: on_progress(FetchProgress(bytes_done=done, bytes_total=total, phase="convert")),
    )
    entry.publish(source, {name: (out_dir / name).stat().st_size for name in os.listdir(out_dir)}, out_dir)
