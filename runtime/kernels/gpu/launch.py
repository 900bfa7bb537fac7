"""Launches of Triton kernels at a fraction of Triton's own cost on the host.

Triton looks at all of its settings and at every argument anew for each launch, tens of microseconds long; a
step with prompts in it launches hundreds of kernels. Here a launch looks up what was compiled for arguments
of the same kind, and only what is new goes through Triton. Nor is there need of Triton's arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from triton.runtime.jit import JITFunction


class Kernel:
    """A kernel as `triton.jit` makes it, launched in the same way: kernel[grid](*arguments, **constants).

    Arguments are given by position; constants, and settings such as num_warps, by name.
    """

    def __init__(self, function: JITFunction[Any]) -> None:
        self.function = function
        self._variants: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, (*grid, 1, 1)[:3])

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        key = (*map(_kind, arguments), *constants.items())
        found = self._variants.get(key)
        if found is None:
            compiled = self.function[grid](*arguments, **constants)
            rest = self.function.arg_names[len(arguments) :]
            self._variants[key] = compiled, tuple(constants[name] for name in rest)
        else:
            compiled, given = found
            compiled[grid](*arguments, *given)


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


def kernel(function: Any) -> Any:
    """What is to be launched in place of a function that `triton.jit` made; in its interpreter, that one."""
    return Kernel(function) if isinstance(function, JITFunction) else function


def cdiv(number: int, divisor: int) -> int:
    """number / divisor, rounded up; both positive."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not less than a positive number."""
    return 1 << (number - 1).bit_length()
