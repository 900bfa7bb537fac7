"""Triton's cache of compiled kernels: quick to look into, and counting what it did not have."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import triton
import triton.runtime.cache

_compiled: Counter[str] = Counter()


def prepare() -> None:
    """Make lookups quick and count compilations from now on. May be called again."""
    triton.runtime.cache.triton_key = _compiler_key
    triton.knobs.compilation.listener = _note


def num_compiled() -> int:
    """How many kernels have been compiled in this process, because the cache did not have them."""
    return _compiled.total()


def compiled() -> dict[str, int]:
    """The names of those kernels, and how many variants of each."""
    return dict(_compiled)


def _note(*, src: Any, cache_hit: bool, **_: object) -> None:
    if not cache_hit:
        _compiled[src.name] += 1


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
