"""The compiled CPU kernels: `cpu.c` built for this machine on first use, kept in the user's cache.

There is no build step to forget and nothing to match against an interpreter: the library is plain C
behind ctypes. Where no C compiler is found, `library()` is None and the plain-torch twins do the work.
`python -m runtime.kernels.native` builds it ahead of time, as an image does.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_name("cpu.c")
_FLAGS = ["-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
_LINK = ["-shared", "-fPIC", "-pthread", "-lm"]

_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, list[type]] = {
    "start_threads": [_int],
    "linear": [_pointer, _long, _long, _pointer, _long, _int, _int, _pointer],
    "add_rms_norm": [_pointer, _pointer, _pointer, _float, _long, _long, _pointer],
    "silu_mul": [_pointer, _long, _long, _pointer],
    "rotary_store": [_pointer] * 6 + [_long] * 6,
    "attention_tile": [_long] * 3,
    "attention": [_pointer] * 5 + [_long] + [_pointer] * 3 + [_long] * 5 + [_float],
}


class Part(ctypes.Structure):
    """One stretch of rows of a linear layer's weights, as `cpu.c` takes it."""

    _fields_ = [("weight", _pointer), ("rows", _long), ("stride", _long), ("bias", _pointer)]


def default_threads() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels with their worker threads running, or None where they cannot be built."""
    path = build()
    if path is None:
        return None
    loaded = ctypes.CDLL(str(path))
    for name, arguments in _SIGNATURES.items():
        getattr(loaded, name).argtypes = arguments
        getattr(loaded, name).restype = _int if name == "attention_tile" else None
    loaded.start_threads(default_threads())
    return loaded


def build() -> Path | None:
    """Compile the kernels unless that has been done for this source and this processor."""
    if os.environ.get("FIRSTLIGHT_CPU_KERNELS") == "torch" or sys.platform != "linux":
        return None
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "firstlight" / "kernels"
    target = directory / f"cpu-{_fingerprint()}.so"
    if target.exists():
        return target
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        print(
            "firstlight: no C compiler found; the slower torch kernels are used on the CPU", file=sys.stderr
        )
        return None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            fresh = Path(scratch) / "cpu.so"
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(fresh), *_LINK]
            subprocess.run(command, check=True, capture_output=True, text=True)
            fresh.replace(target)  # another process may have been faster: either file will do
    except (OSError, subprocess.CalledProcessError) as error:
        details = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        print(
            f"firstlight: the CPU kernels could not be built, torch is used instead: {details}",
            file=sys.stderr,
        )
        return None
    return target


def _fingerprint() -> str:
    """What a build depends on: the source, how it is compiled, and what this processor can do."""
    features = platform.machine()
    with open("/proc/cpuinfo") as info:
        for line in info:
            if line.startswith(("flags", "Features")):
                features += line
                break
    text = _SOURCE.read_bytes() + " ".join(_FLAGS + _LINK).encode() + features.encode()
    return hashlib.sha256(text).hexdigest()[:16]


if __name__ == "__main__":
    print(build())
