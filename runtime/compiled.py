"""C sources -> a shared library: built on first use and kept in the user's cache, or shipped with an image.

There is no build step to forget and nothing to match against an interpreter: the libraries are plain C
behind ctypes, and whatever they do has a plain twin for machines without a compiler.
"""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path


class CannotCompile(Exception):
    """There is no C compiler, or it failed."""


@dataclass(frozen=True)
class Library:
    """The sources in one folder, and how they become `<name>-<target>-<fingerprint>.so`.

    A target says what for: a processor's generation, its features, or nothing in particular.
    """

    name: str
    sources: Path
    flags: tuple[str, ...]
    link: tuple[str, ...]

    def cached(self, *target: str) -> Path:
        """Where a build on this machine is kept."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "firstlight" / "kernels" / f"{self.name}-{self._fingerprint(*target)}.so"

    def shipped(self, target: str) -> Path:
        """Where an image has its build: next to the folder of the sources."""
        return self.sources.with_name(f"{self.name}-{target}-{self._fingerprint(target)}.so")

    def compile(self, path: Path, *flags: str) -> None:
        """Build the library there. Raises `CannotCompile`."""
        import shutil
        import subprocess
        import tempfile

        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise CannotCompile("no C compiler found")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                fresh = Path(scratch) / path.name
                sources = [str(file) for file in sorted(self.sources.glob("*.c"))]
                command = [compiler, *self.flags, *flags, *sources, "-o", str(fresh), *self.link]
                subprocess.run(command, check=True, capture_output=True, text=True)
                fresh.replace(path)  # another process may have been faster: either file will do
        except (OSError, subprocess.CalledProcessError) as error:
            details = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
            raise CannotCompile(f"{self.name} could not be built ({details})") from error

    def _fingerprint(self, *target: str) -> str:
        """What a build depends on: the source, how it is compiled, and what for."""
        digest = hashlib.sha256(" ".join([platform.machine(), *self.flags, *self.link, *target]).encode())
        for path in sorted(self.sources.glob("*.[ch]")):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()[:16]
