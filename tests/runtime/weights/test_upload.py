"""Weights on a device, with either kind of readers; the driver is a stand-in whose device is host memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime.model.families import read_model
from runtime.weights.checkpoint import read_checkpoint
from runtime.weights.loader import MappedWeights
from runtime.weights.plan import make_plan
from tests.runtime.weights.conftest import write_model

HERE = Path(__file__).parent
# Loads a model's share and writes what the arena holds to a file, after as many loads as are asked for.
LOAD = """
import ctypes, sys
from pathlib import Path
from runtime.errors import FirstlightError
from runtime.model.families import read_model
from runtime.weights import native_readers, readers
from runtime.weights.checkpoint import read_checkpoint
from runtime.weights.cuda_driver import Driver
from runtime.weights.plan import make_plan
from runtime.weights.upload import DeviceWeights

directory, target, kind, rank, world_size, cut = sys.argv[1:]
assert (native_readers.library() is None) == (kind == "python")
native_readers.CHUNK_BYTES = 3000
native_readers._BUFFER_BYTES = readers.BUFFER_BYTES = 1000
directory = Path(directory)
plan = make_plan(read_model(directory), read_checkpoint(directory), int(rank), int(world_size))
if cut == "cut":
    with plan.files[-1].open("r+b") as file:
        file.truncate(plan.files[-1].stat().st_size - 100)
weights = DeviceWeights(plan, Driver())
seen = []
try:
    for _ in range(2):
        weights.load(seen.append)
except FirstlightError as error:
    print(error)
    sys.exit(3)
assert max(seen) >= weights.num_bytes and seen.count(max(seen)) >= 2
Path(target).write_bytes(ctypes.string_at(weights.address, plan.arena_bytes))
"""

KINDS = ["native", "python"]
pytestmark = pytest.mark.skipif(
    not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")), reason="no C compiler"
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1 for machines that have none."""
    folder = tmp_path_factory.mktemp("driver")
    command = ["cc", "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(HERE / "fake_driver.c")]
    subprocess.run(command, check=True)
    return folder


def load(
    driver: Path, kind: str, directory: Path, target: Path, rank: int = 0, world_size: int = 1, **fails: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver), "FIRSTLIGHT_READERS": kind}
    if "call" in fails:
        environment["FAKE_DRIVER_FAILS"] = fails["call"]
    arguments = [directory, target, kind, rank, world_size, fails.get("file", "whole")]
    return subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, arguments)],
        env=environment, cwd=HERE.parents[2], capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_the_arena_holds_the_files_bytes(
    driver: Path, llama: Path, tmp_path: Path, kind: str, rank: int, world_size: int
) -> None:
    done = load(driver, kind, llama, tmp_path / "arena", rank, world_size)
    assert (done.returncode, done.stderr) == (0, "")
    arena = (tmp_path / "arena").read_bytes()
    plan = make_plan(read_model(llama), read_checkpoint(llama), rank, world_size)
    mapped = MappedWeights(plan).tensors()
    for parameter in plan.parameters:
        expected = b"".join(
            part.contiguous().view(torch.uint8).numpy().tobytes() for part in mapped[parameter.name]
        )
        assert arena[parameter.offset : parameter.offset + len(expected)] == expected, parameter.name


PARTS = """
import ctypes, os, sys
from pathlib import Path
from runtime.weights import native_readers, readers
from runtime.weights.checkpoint import TensorInfo
from runtime.weights.cuda_driver import Driver
from runtime.weights.plan import Piece, Plan, PlannedParameter
from runtime.weights.upload import DeviceWeights

file, width = Path(sys.argv[1]), int(sys.argv[2])
native_readers.CHUNK_BYTES = 60_000
native_readers._BUFFER_BYTES = readers.BUFFER_BYTES = 9_000
content = os.urandom(50 + 101 * 8192)
file.write_bytes(content)
tensor = TensorInfo("t", "F32", (101, 2048), file, 50, len(content))
first = 3 * width
piece = Piece(tensor, ((5, 60), (70, 101)), (first, first + width))
weights = DeviceWeights(Plan((PlannedParameter("t", (piece,), 256),), 256 + piece.num_bytes), Driver())
weights.load(lambda done: None)
rows = [*range(5, 60), *range(70, 101)]
starts = [50 + row * 8192 + 4 * first for row in rows]
expected = b"".join(content[start : start + 4 * width] for start in starts)
assert ctypes.string_at(weights.address + 256, piece.num_bytes) == expected
"""


@pytest.mark.parametrize("width", [64, 256, 512])
def test_parts_of_rows(driver: Path, tmp_path: Path, width: int) -> None:
    """Columns of 256, 1024 and 2048 bytes: read along with what is between them, or one by one."""
    done = subprocess.run(
        [sys.executable, "-c", PARTS, str(tmp_path / "file"), str(width)],
        env={**os.environ, "LD_LIBRARY_PATH": str(driver), "FIRSTLIGHT_READERS": "native"},
        cwd=HERE.parents[2], capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["cuMemHostAlloc", "cuMemcpyHtoDAsync_v2"])
def test_a_call_of_the_driver_that_fails_is_named(driver: Path, tmp_path: Path, kind: str, call: str) -> None:
    write_model(tmp_path, torch.float16)
    done = load(driver, kind, tmp_path, tmp_path / "arena", call=call)
    assert done.returncode == 3, done.stderr
    assert f"failed in {call.removesuffix('_v2')}" in done.stdout
    assert "an illegal address (700)" in done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_short_meanwhile_is_named(driver: Path, tmp_path: Path, kind: str) -> None:
    write_model(tmp_path, torch.float16)
    done = load(driver, kind, tmp_path, tmp_path / "arena", file="cut")
    assert done.returncode == 3, done.stderr
    assert "model-2.safetensors ends before byte" in done.stdout or "model-1.safetensors ends" in done.stdout
