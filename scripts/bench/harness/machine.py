"""What a figure was measured on, and whether the machine was quiet enough for it to mean anything."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

QUIET_LOAD = 0.3


def facts() -> dict[str, Any]:
    """Processor, cores, memory, kernel, GPUs, versions, and the load average before the run."""
    return {
        "processor": _first_field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": _first_field("/proc/meminfo", "MemTotal"),
        "kernel": platform.release(),
        "gpus": gpus(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "load_average": load_average(),
    }


def load_average() -> float:
    """Of the last minute."""
    return os.getloadavg()[0]


def warn_if_busy() -> None:
    """Say so on stderr if someone else is using the machine."""
    load = load_average()
    if load > QUIET_LOAD:
        print(
            f"warning: the load average is {load:.2f} before anything was started: something else is "
            "running, and only ratios within this run mean anything",
            file=sys.stderr,
        )


def device(name: str) -> str:
    """What the device `auto` means on this machine: "cuda" or "cpu"."""
    if name != "auto":
        return name
    return "cuda" if gpus() else "cpu"


def gpus() -> list[str]:
    """Name and driver of each GPU, as nvidia-smi tells them; empty where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _first_field(path: str, name: str) -> str | None:
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
