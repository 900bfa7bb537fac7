"""What a GPU can do: `python -m harness.limits_cuda` prints it as JSON.

In a process of its own, so that its memory is free again before an engine starts, and small enough to
fit beside one that is idle.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from harness import BenchError

_UPLOAD_BYTES = 1 << 29
_REPEATS = 10


def measure() -> dict[str, float]:
    """Bytes read a second, bf16 operations a second, and bytes a second from pinned host memory."""
    from gpu import limits

    found = limits.measure()
    return {"read": found.read, "product": found.product, "upload": _upload()}


def _upload() -> float:
    import torch

    pinned = torch.empty(_UPLOAD_BYTES, dtype=torch.uint8, pin_memory=True)
    landing = torch.empty(_UPLOAD_BYTES, dtype=torch.uint8, device="cuda")

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            landing.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(1)
    return _REPEATS * _UPLOAD_BYTES / seconds(_REPEATS)


def measure_apart() -> dict[str, float]:
    """The same, in a process of its own."""
    command = [sys.executable, "-m", "harness.limits_cuda"]
    bench = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=bench, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"the GPU's limits could not be measured:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    print(json.dumps(measure()))
