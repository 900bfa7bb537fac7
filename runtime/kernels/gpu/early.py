"""Kernels that start before what they depend on is through: programmatic dependent launch.

Between two kernels that follow each other a GPU is idle for some microseconds, and a decode step is hundreds
of short kernels. On Hopper and newer, a kernel that is launched early gets its place as soon as all programs
of the one before have called `begin`, or have ended. What it does until its own `begin` overlaps with that
one, and with those before it. So a product has its first weights on the way while the norm whose result it
multiplies them with is computed.

What holds for all of them:

- Until `begin`, a kernel reads nothing but weights, and writes nothing. From then on everything that was
  launched before is through, all that it wrote can be seen, and nothing of it reads any more.
- That is so because some program of every kernel that is launched early calls `begin`: a kernel waits for the
  one before only, which in turn was through only after the one before that.
- The first kernels of a step (`prepare.py`, torch's copies) are launched as usual. So weights that were
  written earlier in the same stream are there.

(CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, "griddepcontrol".)
"""

from __future__ import annotations

from functools import cache

import torch

from runtime.kernels.gpu.language import INTERPRETED, tl, triton

_CAPABILITY = 9, 0
_EARLY = {"EARLY": True, "launch_pdl": True}
_LATE = {"EARLY": False}


@cache
def can_start_early() -> bool:
    """Whether kernels can do so on this kind of GPU."""
    return not INTERPRETED and torch.cuda.get_device_capability() >= _CAPABILITY


def early_launch() -> dict[str, bool]:
    """What a kernel that has the constant EARLY, and calls `begin`, is launched with on this kind of GPU."""
    return _EARLY if can_start_early() else _LATE


@triton.jit
def begin(EARLY: tl.constexpr):
    """Let the next kernel start, and wait until what was launched before this one is through."""
    let_next_start(EARLY)
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """All that a kernel has to do with it which is itself launched as usual."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
