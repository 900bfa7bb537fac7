"""Compiled kernels, kept by what they are launched with, so that finding one takes no compiler.

Triton's own cache is keyed by a kernel's analysed source: who looks into it must have imported Triton and
gone through the source, which takes longer for the kernels of a first token than computing it. Here a binary
lies under its kernel's name and the kinds of its arguments, in a folder for this state of all the kernels'
files, this release of Triton and this kind of GPU. A folder that an image ships comes first, then the user's,
within Triton's cache.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHIPPED = HERE / "compiled"
# What Triton calls the types of arguments, as `struct` does.
_FORMATS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I",
    "u64": "Q", "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip
# What launching a kernel may take more.
_SPECIAL = ("launch_cooperative_grid", "global_scratch_size", "profile_scratch_size")
# Environment variables of Triton's that change nothing about what it compiles; its settings become some, too.
_HARMLESS = {
    *("TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_INTERPRET"),
    *("TRITON_STORE_BINARY_ONLY", "TRITON_LIBCUDA_PATH"),
}


@dataclass(frozen=True, slots=True)
class Binary:
    """A kernel's code, and how it is launched.

    symbol   its name in the code
    threads  of a program
    shared   bytes of shared memory that a launch asks for
    passed   which of the arguments the code takes, the others being compiled in
    formats  the type of each, as `struct` calls it
    early    whether it may start before what was launched before it is through; see `early.py`
    """

    symbol: str
    threads: int
    shared: int
    passed: tuple[int, ...]
    formats: str
    early: bool
    code: bytes

    @staticmethod
    def of(compiled: Any, num_arguments: int) -> Binary | None:
        """What Triton has compiled; None if launching it takes more than what is noted here."""
        metadata = compiled.metadata
        special = [metadata.num_ctas != 1, *(getattr(metadata, name, False) for name in _SPECIAL)]
        types = list(compiled.src.signature.values())[:num_arguments]
        passed = [index for index, kind in enumerate(types) if kind != "constexpr"]
        formats = ["Q" if types[index].startswith("*") else _FORMATS.get(types[index]) for index in passed]
        if any(special) or None in formats:
            return None
        return Binary(
            metadata.name,
            metadata.num_warps * metadata.target.warp_size,
            metadata.shared,
            tuple(passed),
            "".join(map(str, formats)),
            bool(getattr(metadata, "launch_pdl", False)),
            compiled.asm["cubin"],
        )


def find(capability: int, name: str, key: str) -> Binary | None:
    """The binary that was kept for a kernel of this name and for launches of this kind."""
    fingerprint = _fingerprint(capability)
    if fingerprint is None:
        return None
    for root in (SHIPPED, _users_folder()):
        try:
            head, _, code = (root / fingerprint / _file(name, key)).read_bytes().partition(b"\n")
            known = json.loads(head)
            return Binary(**{**known, "passed": tuple(known["passed"])}, code=code)
        except (OSError, ValueError, TypeError, KeyError):
            continue  # it is not there, or was damaged
    return None


def keep(root: Path | None, capability: int, name: str, key: str, binary: Binary) -> None:
    """Keep a binary in the user's folder, or in one within `root`, if that can be written to."""
    fingerprint = _fingerprint(capability)
    if fingerprint is None:
        return
    path = (root or _users_folder()) / fingerprint / _file(name, key)
    known = asdict(binary)
    code = known.pop("code")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(json.dumps(known).encode() + b"\n" + code)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError:
        return  # it is found in Triton's own cache


def _file(name: str, key: str) -> str:
    return f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"


@functools.cache
def _fingerprint(capability: int) -> str | None:
    """What all binaries depend on; None if it cannot be told, or if Triton is told to compile otherwise."""
    if any(name.startswith("TRITON_") and name not in _HARMLESS for name in os.environ):
        return None
    spec = PathFinder.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    version = re.search(rb"__version__ = .*", Path(spec.origin).read_bytes())
    if version is None:
        return None
    digest = hashlib.sha256(version[0])
    for path in sorted([*HERE.rglob("*.py"), *HERE.rglob("*.cu")]):
        digest.update(path.relative_to(HERE).as_posix().encode() + b"\0" + path.read_bytes())
    return f"launches-{capability}-{digest.hexdigest()[:32]}"


def _users_folder() -> Path:
    """Where Triton has its cache."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home()) / ".triton" / "cache"
    return Path(os.environ.get("TRITON_CACHE_DIR") or home)
