"""Kernels that start before what they depend on is through: programmatic dependent launch.

Between two kernels that follow each other a GPU is idle for some microseconds, and a decode step is hundreds
of short kernels. On Hopper and Blackwell, a kernel that is launched early gets its place as soon as all
programs of the one before have called `let_next_start`, or have ended. What it does until it calls `wait`
overlaps with that one, and with those before it: a product of one row has its first weights on the way while
the norm is computed whose result it multiplies them with.

What holds for all of them:

- Until `wait`, a kernel reads nothing but weights, and writes nothing. From then on everything that was
  launched before is through, all that it wrote can be seen, and nothing of it reads any more.
- That is so because some program of every kernel that is launched early calls `wait`: it waits for the kernel
  before only, which in turn was through only after the one before that.
- The first kernels of a step (`prepare.py`, torch's copies) are launched as usual. So weights that were
  written earlier in the same stream are there; those that another stream brings, when the event is done that
  the stream waits for.

When to let the next kernel start is a matter of measuring: its programs go where there is room, which is
everywhere as long as short kernels run, but not beside a product with few large programs.

(CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, "griddepcontrol".)
"""

from __future__ import annotations

from functools import cache

import torch

from runtime.kernels.gpu.language import INTERPRETED, tl, triton

# The first numbers of compute capabilities: servers' GPUs, which have the shared memory for the products that
# are chosen where kernels start early.
_CAPABILITIES = 9, 10
_EARLY = {"EARLY": True, "launch_pdl": True}
_LATE = {"EARLY": False}


@cache
def can_start_early() -> bool:
    """Whether kernels can do so on this kind of GPU."""
    return not INTERPRETED and torch.cuda.get_device_capability()[0] in _CAPABILITIES


def early_launch() -> dict[str, bool]:
    """What a kernel that has the constant EARLY, and calls `wait`, is launched with on this kind of GPU."""
    return _EARLY if can_start_early() else _LATE


@triton.jit
def begin(EARLY: tl.constexpr):
    """Both at once, for a short kernel."""
    let_next_start(EARLY)
    wait(EARLY)


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """Let the next kernel start, if it is launched early; this one need not be."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(EARLY: tl.constexpr):
    """Wait until everything is through that was launched before."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
