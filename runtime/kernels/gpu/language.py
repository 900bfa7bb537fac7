"""Triton as the kernels' files take it: `from runtime.kernels.gpu.language import tl, triton`.

A start that finds its kernels compiled needs nothing of Triton, whose import takes a fifth of torch's. So
something stands in for it here, which notes what `triton.jit` is to be applied to, until a kernel has to be
compiled: then `bring` imports Triton, and the kernels' files get the real things in place of what stood in.
In Triton's interpreter, and where Triton is imported already, nothing stands in for anything.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")
# The kernels' files.
PLACE = __name__.rpartition(".")[0] + "."


class Noted:
    """A function that `triton.jit` is to be applied to with these options."""

    def __init__(self, function: FunctionType, options: dict[str, Any]) -> None:
        self.fn = function
        self.do_not_specialize = options.get("do_not_specialize", ())
        self.do_not_specialize_on_alignment = options.get("do_not_specialize_on_alignment", ())
        self.options = options


class Constant:
    """A number that is to become a `tl.constexpr`."""

    def __init__(self, value: float) -> None:
        self.value = value


class _Triton:
    """What stands in for `triton`."""

    @staticmethod
    def jit(function: FunctionType | None = None, **options: Any) -> Noted | Callable[[FunctionType], Noted]:
        """See `triton.jit`."""
        return (lambda given: Noted(given, options)) if function is None else Noted(function, options)


class _Language:
    """What stands in for `triton.language`."""

    constexpr = Constant


_lock = threading.Lock()
_real: dict[Noted | Constant | _Triton | _Language, Any] = {}


def bring() -> None:
    """Import Triton, and put it in place of what stands in for it."""
    with _lock:
        for name, module in list(sys.modules.items()):
            if name.startswith(PLACE):
                for key, value in list(vars(module).items()):
                    if isinstance(value, Noted | Constant | _Triton | _Language):
                        setattr(module, key, real(value))


def real(noted: Noted | Constant | _Triton | _Language) -> Any:
    """What of Triton something stands in for: always the same."""
    if noted not in _real:
        compiler, language = importlib.import_module("triton"), importlib.import_module("triton.language")
        match noted:
            case Noted():
                _real[noted] = compiler.jit(**noted.options)(noted.fn)
            case Constant():
                _real[noted] = language.constexpr(noted.value)
            case _Triton():
                _real[noted] = compiler
            case _Language():
                _real[noted] = language
    return _real[noted]


if INTERPRETED or "triton" in sys.modules:
    triton: Any = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")
else:
    triton, tl = _Triton(), _Language()
