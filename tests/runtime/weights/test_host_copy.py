"""Device memory that goes and comes back from its copy; the driver's device is host memory, too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.weights.test_upload import HERE, driver, pytestmark

__all__ = ["driver", "pytestmark"]

# Two regions of 5 and 3 MB are copied in as many parts as are asked for, which come to 2 MB at least.
COPY = """
import ctypes, os, sys
from runtime.errors import FirstlightError
from runtime.weights.cuda_driver import Driver
from runtime.weights.host_copy import HostCopy
from runtime.weights.virtual_memory import VirtualMemory

driver = Driver()
stream = driver.stream()
regions = [VirtualMemory(driver, 5_000_001), VirtualMemory(driver, 3_000_000)]
contents = [os.urandom(region.num_bytes) for region in regions]
for region, content in zip(regions, contents):
    ctypes.memmove(region.address, content, len(content))
copy = HostCopy(driver, regions, stream)
parts, order = int(sys.argv[1]), eval(sys.argv[2])
try:
    for part in order:
        copy.make(part, parts)
except FirstlightError as error:
    print(error)
    copy.close()
    sys.exit(3)
for _ in range(2):
    for region in regions:
        region.give_back()
        ctypes.memset(region.address, 0, region.num_bytes)
    copy.fill()
    driver.synchronize(stream)
    assert [ctypes.string_at(region.address, region.num_bytes) for region in regions] == contents
library = ctypes.CDLL("libcuda.so.1")
library.fake_pinned.restype = ctypes.c_size_t
assert library.fake_pinned() == sum(map(len, contents)) and library.fake_unpinned() == 0
copy.close()
assert library.fake_unpinned() == min(parts, 4)
copy.fill()  # without a copy, the memory alone
"""


def copied(driver: Path, parts: int, order: str, fails: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver), "FAKE_DRIVER_FAILS": fails}
    return subprocess.run(
        [sys.executable, "-c", COPY, str(parts), order],
        env=environment, cwd=HERE.parents[2], capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "order"), [(1, "[0]"), (30, "range(30)"), (4, "[0, 1, 0, 1, 2, 3, 2, 3]")], ids=str
)
def test_what_was_copied_comes_back_as_often_as_one_likes(driver: Path, parts: int, order: str) -> None:
    """In one part, in more than there is to copy, begun anew halfway; nothing is pinned twice."""
    done = copied(driver, parts, order)
    assert (done.returncode, done.stderr) == (0, "")


def test_memory_that_cannot_be_pinned_is_told_of(driver: Path) -> None:
    done = copied(driver, 4, "range(4)", fails="cuMemHostRegister_v2")
    assert (done.returncode, done.stderr) == (3, "")
    assert "cuMemHostRegister_v2" in done.stdout
