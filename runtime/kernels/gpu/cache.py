"""Triton's cache of compiled kernels: quick to look into, counting what it lacked, shipped with an image.

What an image ships lies in `compiled/`, next to this file, and is never written to; what is not there is
looked for in the user's own cache (`TRITON_CACHE_DIR`), and put there.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import triton
import triton.runtime.cache
from triton.runtime.cache import FileCacheManager

from runtime.kernels.gpu.binaries import SHIPPED

_compiled: Counter[str] = Counter()


def prepare() -> None:
    """Make lookups quick and count compilations from now on. May be called again."""
    triton.runtime.cache.triton_key = _compiler_key
    triton.knobs.cache.manager_class = _ShippedFirst
    triton.knobs.compilation.listener = _note
    # The other forms that a kernel takes while it is compiled would be read at each start.
    triton.knobs.compilation.store_binary_only = True


def num_compiled() -> int:
    """How many kernels have been compiled in this process, because the cache did not have them."""
    return _compiled.total()


def compiled() -> dict[str, int]:
    """The names of those kernels, and how many variants of each."""
    return dict(_compiled)


def _note(*, src: Any, cache_hit: bool, **_: object) -> None:
    if not cache_hit:
        _compiled[src.name] += 1


class _ShippedFirst(FileCacheManager):  # type: ignore[misc]
    """What the cache has under one key."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        shipped = SHIPPED / key
        if override or dump or not shipped.is_dir():
            super().__init__(key, override, dump)
        else:
            self.key, self.cache_dir, self.lock_path = key, str(shipped), None

    def get_group(self, filename: str) -> dict[str, str] | None:
        """The files of a kernel. They lie together, wherever that was when they were written."""
        try:
            listed = json.loads(Path(self.cache_dir, f"__grp__{filename}").read_bytes())["child_paths"]
        except (OSError, ValueError, KeyError):
            return None
        found = {name: Path(self.cache_dir, name) for name in listed}
        return (
            {name: str(path) for name, path in found.items()}
            if all(map(Path.exists, found.values()))
            else None
        )


_read_all_of_triton = triton.runtime.cache.triton_key


@functools.cache
def _compiler_key() -> str:
    """What identifies the installed compiler in the cache's keys.

    Triton reads all of its files for that, 400 MB, at the first lookup of a process. Their hashes are in
    the list of files that came with the package.
    """
    root = Path(triton.__file__).parent.parent
    try:
        record = (root / f"triton-{triton.__version__}.dist-info" / "RECORD").read_text(encoding="utf-8")
    except OSError:
        key: str = _read_all_of_triton()
        return key
    lines = sorted(line for line in record.splitlines() if line.startswith("triton/") and "sha256=" in line)
    return f"{triton.__version__}-{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}"
