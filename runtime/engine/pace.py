"""How the interpreter is set while an engine starts, and while it serves."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Whoever brings the weights waits for Python's lock between two calls, which torch's import lets go of this
# often: it must not be the weights that a start waits for. The other is Python's own.
_STARTING_SWITCH_S, _SERVING_SWITCH_S = 0.0005, 0.005


def hurry() -> None:
    """For the start: nothing that it makes is garbage, and looking through it takes a tenth of an import."""
    gc.disable()
    sys.setswitchinterval(_STARTING_SWITCH_S)


def settle() -> None:
    """From the end of the start on: what it has made stays, and what comes later is looked through."""
    gc.freeze()
    gc.enable()
    sys.setswitchinterval(_SERVING_SWITCH_S)


@contextmanager
def uncollected() -> Iterator[None]:
    """Nothing that is only held by cycles of references is freed meanwhile.

    torch ends the process if a memory pool, say of an engine that nobody needs any more, goes while
    allocations or a capture of this process are directed into another one.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
