"""Device memory that goes and comes back from what is kept of it; the driver's device is host memory, too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runtime.weights.conftest import write_model
from tests.runtime.weights.test_upload import HERE, driver, pytestmark

__all__ = ["driver", "pytestmark"]

COMMON = """
import ctypes, os, sys
from pathlib import Path
from runtime.errors import FirstlightError
from runtime.weights.cuda_driver import Driver
from runtime.weights.host_copy import HostCopy, extents_of_plan, extents_of_regions
from runtime.weights.loaded_files import LoadedFiles

driver = Driver()
stream = driver.stream()
library = ctypes.CDLL("libcuda.so.1")
library.fake_downloaded.restype = ctypes.c_size_t

def come_and_go(copy, regions, contents):
    for _ in range(2):
        for region in regions:
            region.give_back()
            ctypes.memset(region.address, 0, region.num_bytes)
        copy.fill()
        driver.synchronize(stream)
        assert [ctypes.string_at(region.address, region.num_bytes) for region in regions] == contents

def make(copy, parts, order):
    try:
        for part in order:
            copy.make(part, parts)
    except FirstlightError as error:
        print(error)
        copy.close()
        assert library.fake_left_pinned() == 0
        sys.exit(3)
"""
# Two regions of 5 and 3 MB.
COPY = """
from runtime.weights import host_copy
from runtime.weights.virtual_memory import VirtualMemory

host_copy._EXTENT_BYTES = 1 << 20
regions = [VirtualMemory(driver, 5_000_001), VirtualMemory(driver, 3_000_000)]
contents = [os.urandom(region.num_bytes) for region in regions]
for region, content in zip(regions, contents):
    ctypes.memmove(region.address, content, len(content))
copy = HostCopy(driver, stream, regions, extents_of_regions(regions))
make(copy, int(sys.argv[1]), eval(sys.argv[2]))
come_and_go(copy, regions, contents)
assert library.fake_downloaded() == sum(map(len, contents))
copy.close()
assert library.fake_left_pinned() == 0
copy.fill()  # without a copy, the memory alone
"""
# A model's share is loaded; what becomes of its files before and after it is kept is told.
FILES = """
from runtime.model.families import read_model
from runtime.weights import host_copy
from runtime.weights.checkpoint import read_checkpoint
from runtime.weights.plan import make_plan
from runtime.weights.upload import DeviceWeights

host_copy._EXTENT_BYTES, host_copy.MIN_PART_BYTES = 1500, 8
directory, rank, world_size, before, after = sys.argv[1:]
plan = make_plan(read_model(Path(directory)), read_checkpoint(Path(directory)), int(rank), int(world_size))
weights = DeviceWeights(plan, Driver())
weights.load(lambda done: None)
regions = [weights.memory]
# What no parameter takes is nobody's, and does not come back.
content = bytearray(weights.memory.num_bytes)
for extent in extents_of_plan(plan, 0):
    content[extent.address : extent.address + extent.num_bytes] = ctypes.string_at(
        weights.address + extent.address, extent.num_bytes
    )
first = plan.files[0]
exec(before)
copy = HostCopy(
    driver, stream, regions, extents_of_plan(plan, weights.address), LoadedFiles(weights.stamps, weights.gate)
)
make(copy, 7, range(7))
exec(after)
come_and_go(copy, regions, [bytes(content)])
print(library.fake_downloaded())
copy.close()
assert library.fake_left_pinned() == 0
"""
REPLACED = (
    "other = first.with_name('new'); other.write_bytes(bytes(first.stat().st_size)); other.replace(first)"
)
WRITTEN = "first.open('r+b').write(b'not what it was')"


def run(driver: Path, code: str, *arguments: object, fails: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver), "FAKE_DRIVER_FAILS": fails}
    return subprocess.run(
        [sys.executable, "-c", COMMON + code, *map(str, arguments)],
        env=environment, cwd=HERE.parents[2], capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def tells_what_is_cached(file: Path) -> bool:
    """Whether the file system says that what was just written is in the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT) == 1
    except OSError:
        return False
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("parts", "order"), [(1, "[0]"), (30, "range(30)"), (4, "[0, 1, 0, 1, 2, 3, 2, 3]")], ids=str
)
def test_what_was_copied_comes_back_as_often_as_one_likes(driver: Path, parts: int, order: str) -> None:
    """In one part, in more than there is to copy, begun anew halfway; nothing is copied twice."""
    done = run(driver, COPY, parts, order)
    assert (done.returncode, done.stderr) == (0, "")


def test_memory_that_cannot_be_pinned_is_told_of(driver: Path) -> None:
    done = run(driver, COPY, 4, "range(4)", fails="cuMemHostRegister_v2")
    assert (done.returncode, done.stderr) == (3, "")
    assert "cuMemHostRegister_v2" in done.stdout


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_weights_that_the_page_cache_has_are_not_copied(
    driver: Path, llama: Path, rank: int, world_size: int
) -> None:
    done = run(driver, FILES, llama, rank, world_size, "", "")
    assert (done.returncode, done.stderr) == (0, "")
    if tells_what_is_cached(next(llama.glob("*.safetensors"))):
        assert int(done.stdout) == 0


@pytest.mark.parametrize("before", [REPLACED, WRITTEN, "first.unlink()"])
def test_weights_whose_files_were_changed_are_copied(driver: Path, tmp_path: Path, before: str) -> None:
    """What comes back is what was loaded."""
    write_model(tmp_path, torch.float16)
    done = run(driver, FILES, tmp_path, 0, 1, before, "")
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 0


def test_files_that_others_take_the_place_of_in_its_sleep_are_still_there(
    driver: Path, tmp_path: Path
) -> None:
    write_model(tmp_path, torch.float16)
    done = run(driver, FILES, tmp_path, 0, 1, "", REPLACED)
    assert (done.returncode, done.stderr) == (0, "")


def test_files_that_are_written_to_in_its_sleep_give_no_weights(driver: Path, tmp_path: Path) -> None:
    write_model(tmp_path, torch.float16)
    if tells_what_is_cached(next(tmp_path.glob("*.safetensors"))):
        done = run(driver, FILES, tmp_path, 0, 1, "", WRITTEN)
        assert "was changed while the model that was loaded from it slept" in done.stderr
