"""Between the files and whoever reads them: are these bytes there yet?

A loader opens files and waits for ranges through a gate, so that it need not know whether the files have
been there all along or are still being downloaded. The names of files are those that they have, or will
have once they are whole: `<model's directory>/<name>`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol


class Gate(Protocol):
    """Hands out files' descriptors and says when ranges can be read from them. Safe from many threads.

    What it lets through may be wrong until the whole file has been verified. Then the load is repeated:
    who put the gate there sees to it. Every method may raise, and then the load is given up.
    """

    def names(self, directory: Path) -> set[str]:
        """The names of the model's files in its directory."""

    def open(self, file: Path) -> int:
        """A descriptor to read `file` with, which has its full size; the caller closes it."""

    def wait(self, file: Path, start: int, stop: int) -> None:
        """Return once the bytes [start, stop) of `file` can be read."""

    def turn(self, file: Path, start: int) -> tuple[int, int]:
        """When the byte `start` is due: of two ranges, that with the smaller turn should be read first.

        Ranges that compare equal may be read in any order.
        """


class Open:
    """The gate before files that are all there."""

    def names(self, directory: Path) -> set[str]:
        return set(os.listdir(directory))

    def open(self, file: Path) -> int:
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def wait(self, file: Path, start: int, stop: int) -> None:
        pass

    def turn(self, file: Path, start: int) -> tuple[int, int]:
        return 0, 0


OPEN = Open()
