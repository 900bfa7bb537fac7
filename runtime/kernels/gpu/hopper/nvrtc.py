"""CUDA C++ to a GPU's code, by the compiler library that comes along with torch.

Source: the NVRTC documentation.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from ctypes import byref, c_char_p, c_size_t, c_void_p
from importlib.machinery import PathFinder
from pathlib import Path


class CannotCompile(Exception):
    """There is no compiler, or it does not take the source."""


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiler. What it is built of lies beside it, where it does not look itself."""
    spec = PathFinder.find_spec("nvidia")
    for place in [] if spec is None else spec.submodule_search_locations or []:
        for path in sorted(Path(place).glob("*/lib/libnvrtc.so.*")):
            for part in path.parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(part))
            return ctypes.CDLL(str(path))
    raise CannotCompile("NVRTC is not installed")


def compile_cuda(source: str, architecture: str, definitions: Mapping[str, int]) -> bytes:
    """The code of a source text for an architecture such as sm_90a. Raises `CannotCompile`."""
    library, program = _library(), c_void_p()
    options = [f"--gpu-architecture={architecture}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in definitions.items()]
    encoded = (c_char_p * len(options))(*(option.encode() for option in options))
    if library.nvrtcCreateProgram(byref(program), c_char_p(source.encode()), None, 0, None, None):
        raise CannotCompile("NVRTC takes no programs")
    try:
        if library.nvrtcCompileProgram(program, len(options), encoded):
            raise CannotCompile(_output(library, "ProgramLog", program).decode())
        return _output(library, "CUBIN", program)
    finally:
        library.nvrtcDestroyProgram(byref(program))


def _output(library: ctypes.CDLL, what: str, program: c_void_p) -> bytes:
    size = c_size_t()
    library[f"nvrtcGet{what}Size"](program, byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    library[f"nvrtcGet{what}"](program, buffer)
    return buffer.raw
