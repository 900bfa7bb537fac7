"""What a GPU can do: `python -m harness.limits_cuda` prints it as JSON.

In a process of its own, so that its memory is free again before an engine starts, and small enough to
fit beside one that is idle.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from harness import BenchError

_BYTES = 2 << 30
_MATRIX = 8192
_REPEATS = 10


def measure() -> dict[str, float]:
    """Bytes read a second, bf16 operations a second, and bytes a second from pinned host memory."""
    import torch

    def seconds(work: Callable[[], object]) -> float:
        for _ in range(3):
            work()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(_REPEATS):
            work()
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / _REPEATS

    data = torch.empty(_BYTES // 2, dtype=torch.bfloat16, device="cuda").normal_()
    integers = data.view(torch.int16)
    pinned = torch.empty(_BYTES // 4, dtype=torch.uint8, pin_memory=True)
    landing = data.view(torch.uint8)[: _BYTES // 4]
    left, right = (torch.randn(_MATRIX, _MATRIX, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return {
        "read": _BYTES / seconds(integers.max),
        "product": 2 * _MATRIX**3 / seconds(lambda: left @ right),
        "upload": pinned.nbytes / seconds(lambda: landing.copy_(pinned, non_blocking=True)),
    }


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
