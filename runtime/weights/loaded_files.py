"""The files that weights were loaded from: are they still what they were then?"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from runtime.errors import FirstlightError
from runtime.weights.gate import Gate


class ChangedFiles(FirstlightError):
    """What was loaded is no longer in its files; the next start loads what they hold now."""


class Stamp(NamedTuple):
    """What tells a file, and each of its versions, from others."""

    device: int
    inode: int
    num_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, descriptor: int) -> Stamp:
        """That of an open file."""
        found = os.fstat(descriptor)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def stamps(files: Iterable[Path], gate: Gate) -> dict[Path, Stamp]:
    """The present stamps of files."""
    found = {}
    for file in files:
        descriptor = gate.open(file)
        try:
            found[file] = Stamp.of(descriptor)
        finally:
            os.close(descriptor)
    return found


class LoadedFiles:
    """Files with the `stamps` that they had when they were loaded, opened as they are asked for."""

    def __init__(self, stamps: Mapping[Path, Stamp], gate: Gate) -> None:
        self._stamps = stamps
        self._gate = gate
        self._descriptors: dict[Path, int | None] = {}

    def descriptor(self, file: Path) -> int | None:
        """The open file, or None if it is not what was loaded."""
        if file not in self._descriptors:
            self._descriptors[file] = self._opened(file)
        return self._descriptors[file]

    def _opened(self, file: Path) -> int | None:
        try:
            descriptor = self._gate.open(file)
        except (OSError, FirstlightError):
            return None
        if Stamp.of(descriptor) == self._stamps.get(file):
            return descriptor
        os.close(descriptor)
        return None

    def check(self) -> None:
        """Raise `ChangedFiles` if one that was handed out has been written to since."""
        for file, descriptor in self._descriptors.items():
            if descriptor is not None and Stamp.of(descriptor) != self._stamps[file]:
                raise ChangedFiles(f"{file} was changed while the model that was loaded from it slept.")

    def close(self) -> None:
        """Close them all."""
        for descriptor in self._descriptors.values():
            if descriptor is not None:
                os.close(descriptor)
        self._descriptors.clear()
