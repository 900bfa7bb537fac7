"""The compiled CPU kernels: `cpu/` built for this machine on first use, kept in the user's cache.

Where no C compiler is found, `library()` is None and the plain-torch twins do the work.

    python -m runtime.kernels.native          build it ahead of time, for this machine
    python -m runtime.kernels.native image    build it next to `cpu/`, once for each generation of
                                              processors, so that an image needs no compiler
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from pathlib import Path

from runtime.compiled import CannotCompile, Library

_MATH = ("-fno-math-errno", "-fno-trapping-math")
_LIBRARY = Library(
    "cpu",
    Path(__file__).with_name("cpu"),
    flags=("-std=gnu11", "-O3", *_MATH, "-fPIC", "-fvisibility=hidden", "-Wno-psabi"),
    link=("-shared", "-pthread", "-lm"),
)

# The generations that an image is built for, best first, and the features that a processor must have to
# run them (https://gitlab.com/x86-psABIs/x86-64-ABI, "micro-architecture levels").
_V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
_GENERATIONS = {
    "x86_64": {
        "x86-64-v4": _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
        "x86-64-v3": _V3,
    },
    "aarch64": {"armv8-a": {"asimd"}},
}

_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, list[type]] = {
    "start_threads": [_int],
    "embedding": [_pointer, _long, _pointer, _long, _int, _long, _float, _pointer],
    "linear": [_pointer, _long, _long, _pointer, _long, _int, _int, _pointer],
    "add_rms_norm": [_pointer, _pointer, _pointer, _float, _long, _long, _pointer],
    "silu_mul": [_pointer, _long, _long, _pointer],
    "rotary_store": [_pointer] * 6 + [_long] * 6,
    "attention_tile": [_long] * 3,
    "attention": [_pointer] * 5 + [_long] + [_pointer] * 3 + [_long] * 5 + [_float],
    "play": [_pointer, _long],
}


class Part(ctypes.Structure):
    """One stretch of rows of a linear layer's weights, as `cpu/kernels.h` describes it."""

    _fields_ = [("weight", _pointer), ("rows", _long), ("stride", _long), ("bias", _pointer)]


_num_processes = 1


def share_cores(num_processes: int) -> None:
    """Leave the other processes that compute the same model their share of the cores."""
    global _num_processes
    _num_processes = num_processes


def default_threads() -> int:
    """How many cores this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // _num_processes)


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
    """The library for this processor: built earlier, or shipped with an image, or compiled now."""
    if os.environ.get("FIRSTLIGHT_CPU_KERNELS") == "torch" or sys.platform != "linux":
        return None
    features = _features()
    target = _LIBRARY.cached("native", *sorted(features))
    if target.exists():
        return target
    for march, needed in _generations().items():
        if needed <= features and _LIBRARY.shipped(march).exists():
            return _LIBRARY.shipped(march)
    try:
        _LIBRARY.compile(target, "-march=native")
    except CannotCompile as error:
        print(f"firstlight: {error}; the slower torch kernels are used on the CPU", file=sys.stderr)
        return None
    return target


def build_for_image() -> list[Path]:
    """Compile the kernels for each generation of this architecture's processors, next to their source."""
    libraries = [_LIBRARY.shipped(march) for march in _generations()]
    for march, target in zip(_generations(), libraries, strict=True):
        _LIBRARY.compile(target, f"-march={march}")
    return libraries


def _generations() -> dict[str, set[str]]:
    return _GENERATIONS.get(platform.machine(), {})


def _features() -> set[str]:
    """What this processor can do, in the kernel's words."""
    with open("/proc/cpuinfo") as info:
        for line in info:
            if line.startswith(("flags", "Features")):
                return set(line.partition(":")[2].split())
    return set()


if __name__ == "__main__":
    if sys.argv[1:] == ["image"]:
        print(*build_for_image(), sep="\n")
    else:
        print(build())
