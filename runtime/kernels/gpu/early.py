"""Kernels that start before what they depend on is through: programmatic dependent launch.

Between two kernels that follow each other a GPU is idle for about a microsecond, and a decode step is
hundreds of short kernels. On Hopper and newer, a kernel that is launched early is given its place while the
one before it still runs. It must call `gdc_wait` before it reads what others have written, and before it
writes anything; what it does until then, like reading weights, overlaps. `gdc_launch_dependents` lets the
next one in.
(CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".)
"""

from __future__ import annotations

import functools
from typing import Any

import triton
from triton.backends.nvidia.compiler import CUDAOptions
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.driver import driver

__all__ = ["early_launch", "gdc_launch_dependents", "gdc_wait"]

_HOPPER = 90
ENABLED = False
_EARLY = {"EARLY": True, "launch_pdl": True}
_LATE = {"EARLY": False}


def early_launch() -> dict[str, bool]:
    """What a kernel with the constant EARLY is to be launched with, on the present device."""
    if not ENABLED or triton.knobs.runtime.interpret or not _is_new(driver.active):
        return _LATE
    return _EARLY


@functools.cache
def _is_new(active: Any) -> bool:
    target = active.get_current_target()
    return (
        target.backend == "cuda"
        and target.arch >= _HOPPER
        and "launch_pdl" in CUDAOptions.__dataclass_fields__
    )
