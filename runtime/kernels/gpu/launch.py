"""Launches of Triton kernels at a fraction of Triton's own cost on the host.

Triton looks at all of its settings and at every argument anew for each launch, tens of microseconds long; a
step with prompts in it launches hundreds of kernels. Here a launch looks up what was loaded for arguments of
the same kind and calls the driver. What is new is looked for among the binaries that were kept, and only
what is not there goes through Triton. Nor is there need of Triton's arithmetic.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch

from runtime.kernels.gpu import binaries, language
from runtime.kernels.gpu.binaries import Binary
from runtime.kernels.gpu.language import Noted
from runtime.kernels.gpu.loaded import CannotLoad, Loaded

Launch = Callable[[tuple[int, ...], tuple[Any, ...]], None]


class Kernel:
    """A kernel as `triton.jit` makes it, launched in the same way: kernel[grid](*arguments, **constants).

    Arguments are given by position; constants, and settings such as num_warps, by name.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        python: FunctionType = function.fn
        self.name = python.__qualname__
        self._place = python.__module__
        self.is_kept = python.__module__.startswith(language.PLACE)
        self._names = python.__code__.co_varnames[: python.__code__.co_argcount]
        self._any_value = {*function.do_not_specialize}
        self._any_alignment = {*function.do_not_specialize_on_alignment}
        self._launches: dict[Any, Launch] = {}
        self._variants: dict[str, Launch] = {}

    @property
    def function(self) -> Any:
        """What `triton.jit` makes."""
        if isinstance(self._function, Noted):
            self._function = language.real(self._function)
        return self._function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, (*grid, 1, 1)[:3])

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        key = (*map(_kind, arguments), *constants.items())
        launch = self._launches.get(key)
        if launch is None:
            variant = self.key(arguments, constants)
            if variant not in self._variants:
                self._variants[variant] = self._new(variant, grid, arguments, constants)
            launch = self._launches[key] = self._variants[variant]
        launch(grid, arguments)

    def _new(
        self, key: str, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]
    ) -> Launch:
        """How to launch the variant for arguments of a kind that none came of before."""
        binary = binaries.find(_capability(), self.name, key) if self.is_kept else None
        if binary is None:
            binary = Binary.of(self.compile(grid, arguments, constants), len(arguments))
            if binary is not None and self.is_kept:
                binaries.keep(None, _capability(), self.name, key, binary)
        if binary is not None:
            with contextlib.suppress(CannotLoad):
                return Loaded(binary)
        compiled = self.compile(grid, arguments, constants)
        rest = [constants[name] for name in self._names[len(arguments) :]]
        return lambda grid, arguments: compiled[grid](*arguments, *rest)

    def compile(self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> Any:
        """What Triton makes for a launch with these, from its cache or anew."""
        from runtime.kernels.gpu import cache

        cache.prepare()
        language.bring()
        return self.function.run(*arguments, grid=grid, warmup=True, **constants)

    def key(self, arguments: tuple[Any, ...], constants: dict[str, Any]) -> str:
        """All that Triton's choice among a kernel's variants depends on, as text.

        Arguments may be any objects that have a tensor's dtype and address.
        """
        described = [self._described(*each) for each in zip(self._names, arguments, strict=False)]
        return repr((self._place, self.name, described, sorted(constants.items())))

    def _described(self, name: str, argument: Any) -> Any:
        if hasattr(argument, "data_ptr"):
            aligned = name not in self._any_alignment and argument.data_ptr() % 16 == 0
            return str(argument.dtype), aligned and name not in self._any_value
        if type(argument) is not int:
            return argument if argument is None else type(argument).__name__
        _, _, *width = _kind(argument)
        if name in self._any_value:
            return width
        return argument == 1, argument % 16 == 0 and name not in self._any_alignment, *width


def _kind(argument: Any) -> Any:
    """All that Triton's choice among a kernel's variants depends on, and for some kernels more than that."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if type(argument) is int:
        # One is compiled in, multiples of 16 allow wide loads, and large ones need 64 bits.
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31, argument < 2**63
    if argument is None or type(argument) is bool:
        return argument
    return type(argument)


@cache
def _capability() -> int:
    """The GPU's compute capability, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def kernel(function: Any) -> Any:
    """What is to be launched in place of a function that `triton.jit` made; in its interpreter, that one."""
    return function if language.INTERPRETED else Kernel(function)


def num_compiled() -> int:
    """How many kernels have been compiled in this process, because nothing that was kept had them."""
    names = "runtime.kernels.gpu.cache", "runtime.kernels.gpu.hopper.product"
    return sum(sys.modules[name].num_compiled() for name in names if name in sys.modules)


def cdiv(number: int, divisor: int) -> int:
    """number / divisor, rounded up; both positive."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not less than a positive number."""
    return 1 << (number - 1).bit_length()
