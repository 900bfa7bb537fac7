"""A tape of compiled CPU kernels: called once from Python each, then played back all together.

A step of a few tokens consists of hundreds of short kernels, and calling them one by one from Python takes
a good tenth of it. Once recorded, a step of the same shape is a single call, as CUDA graphs are on a GPU:
the same kernels with the same arguments, on whatever its inputs hold by then, into the same memory.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.kernels import native

# As `cpu/tape.c` numbers them.
_KERNELS = ("embedding", "linear", "add_rms_norm", "silu_mul", "rotary_store", "attention")
_aten = torch.ops.aten
_ALLOCATIONS = (_aten.empty.memory_format, _aten.empty_like.default)


class _Call(ctypes.Structure):
    """One kernel and its arguments in their order, the only float among them aside."""

    _fields_ = [("kernel", ctypes.c_long), ("arguments", ctypes.c_long * 14), ("real", ctypes.c_double)]


class Tape:
    """Recorded calls, and the memory that they work in."""

    def __init__(
        self, lib: ctypes.CDLL, calls: list[_Call], memory: list[torch.Tensor], result: torch.Tensor
    ):
        self._lib = lib
        self._calls = (_Call * len(calls))(*calls)
        self._memory = memory
        self._result = result

    def play(self) -> torch.Tensor:
        """Compute anew from what the recorded inputs hold now; the result lies where it always does."""
        self._lib.play(ctypes.addressof(self._calls), len(self._calls))
        return self._result


def record(compute: Callable[[], torch.Tensor]) -> Tape | None:
    """Run `compute` and record it, or None if it does anything besides calling compiled kernels.

    What else it does in torch is noticed; what it does in Python must come to the same each time. Tensors
    that it reads, weights for one, must stay where they are for as long as the tape is played.
    """
    lib = native.library()
    if lib is None:
        return None
    with _Recorder() as recorder, _recorded(lib) as calls:
        result = compute()
    return None if recorder.has_strayed else Tape(lib, calls, recorder.memory, result)


@contextmanager
def _recorded(lib: ctypes.CDLL) -> Iterator[list[_Call]]:
    """The calls of kernels, in a list that grows as they are made."""
    calls: list[_Call] = []
    kernels = {name: getattr(lib, name) for name in _KERNELS}
    for number, (name, kernel) in enumerate(kernels.items()):
        setattr(lib, name, _recording(number, kernel, calls))
    try:
        yield calls
    finally:
        for name, kernel in kernels.items():
            setattr(lib, name, kernel)


def _recording(number: int, kernel: Any, calls: list[_Call]) -> Callable[..., None]:
    def call(*arguments: int | float | None) -> None:
        noted = _Call(number)
        place = 0
        for kind, value in zip(kernel.argtypes, arguments, strict=True):
            if kind is ctypes.c_float:
                noted.real = value
            else:
                noted.arguments[place] = value or 0
                place += 1
        calls.append(noted)
        kernel(*arguments)

    return call


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands out memory that the tape keeps, and notices operators that a tape cannot hold."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory: list[torch.Tensor] = []
        self.has_strayed = False
        self._free: defaultdict[tuple[int, torch.dtype], list[torch.Tensor]] = defaultdict(list)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from importing Dynamo, a second's work, to tell it to leave this class alone."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            return self._lend(out)
        # A cast to the dtype that a tensor has already gives back the tensor.
        self.has_strayed |= func is not _aten.to.dtype or out is not args[0]
        return out

    def _lend(self, fresh: torch.Tensor) -> torch.Tensor:
        """Memory like `fresh`: what was lent before and is out of use by now, or `fresh` itself.

        Without views, which would count as straying, a tensor is out of use as soon as Python forgets it.
        """
        unused = self._free[fresh.numel(), fresh.dtype]
        if unused:
            kept = unused.pop()
        else:
            kept = fresh
            self.memory.append(kept)
        lent = kept.view(fresh.shape)
        weakref.finalize(lent, unused.append, kept).atexit = False
        return lent
