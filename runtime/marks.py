"""Start marks: how long after its execution the process reached each point of its start."""

from __future__ import annotations

import os
import time

# The handler hands its own execution time to the processes that it starts, so that all marks of one
# start share a clock. CLOCK_BOOTTIME is what the kernel stamps processes with.
_ENV = "FIRSTLIGHT_EXEC_TIME"


def exec_time() -> float:
    """CLOCK_BOOTTIME, in seconds, at which the handler (or this lone process) was executed."""
    inherited = os.environ.get(_ENV)
    if inherited:
        return float(inherited)
    with open("/proc/self/stat", "rb") as stat:
        # Field 22, counted after the command name, which may itself hold spaces and brackets.
        ticks = int(stat.read().rpartition(b")")[2].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")


def since_exec() -> float:
    """Seconds since the process was executed (resolution: the kernel's clock tick, 10 ms)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - exec_time()


def environment() -> dict[str, str]:
    """What a child's environment must hold so that its marks count from the same moment."""
    return {_ENV: repr(exec_time())}
