"""Weights on their way from a source onto a device; the driver is a stand-in whose device is host memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.sources.hub_server import HubServer
from tests.runtime.sources.test_arrival import WEIGHTS, Held
from tests.runtime.weights.test_upload import HERE, KINDS, driver

__all__ = ["driver"]  # a fixture
pytestmark = pytest.mark.skipif(
    not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")), reason="no C compiler"
)

# Loads a model from its source, tells how far it is, and writes what the arena holds of it to a file.
LOAD = """
import ctypes, sys
from pathlib import Path
from runtime.model.families import read_model
from runtime.weights import native_readers, readers
from runtime.weights.checkpoint import read_checkpoint
from runtime.weights.cuda_driver import Driver
from runtime.weights.gate import OPEN
from runtime.weights.plan import make_plan
from runtime.catalogue import ModelSpec
from runtime.weights.sources import arrive
from runtime.weights.upload import DeviceWeights

source, cache_dir, target = sys.argv[1:]
native_readers.CHUNK_BYTES, native_readers._BUFFER_BYTES, readers.BUFFER_BYTES = 3000, 1000, 1000
arrival = arrive(ModelSpec(id="m", source=source), Path(cache_dir), lambda progress: None)
directory, gate = arrival.directory, arrival.gate
plan = make_plan(read_model(directory), read_checkpoint(directory, gate))
weights = DeviceWeights(plan, Driver(), gate)
weights.load(lambda done: print(done, flush=True))
assert arrival.settle()
with open(target, "wb") as file:
    for parameter in plan.parameters:
        size = sum(piece.num_bytes for piece in parameter.pieces)
        file.write(ctypes.string_at(weights.address + parameter.offset, size))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_go_on_to_the_device_as_they_land(
    hub: HubServer, driver: Path, tiny_model: Path, cache_dir: Path, tmp_path: Path, kind: str
) -> None:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver), "FIRSTLIGHT_READERS": kind}

    def command(source: str) -> list[str]:
        return [sys.executable, "-c", LOAD, source, str(cache_dir), str(tmp_path / source.replace("/", "-"))]

    hub.add_repo("org/name", tiny_model)
    held = Held(60_000)
    hub.fail("/storage/", **held.fault())
    with subprocess.Popen(
        command("hf://org/name"), env=environment, cwd=HERE.parents[2], stdout=subprocess.PIPE, text=True
    ) as loading:
        assert loading.stdout is not None
        on_the_device = 0
        while not on_the_device:
            on_the_device = int(loading.stdout.readline())
        assert on_the_device < (tiny_model / WEIGHTS).stat().st_size - 40_000
        held.release()
        loading.stdout.read()
    assert loading.returncode == 0
    subprocess.run(command(str(tiny_model)), env=environment, cwd=HERE.parents[2], check=True)
    as_it_came, from_here = (tmp_path / "hf:--org-name", tmp_path / str(tiny_model).replace("/", "-"))
    assert as_it_came.read_bytes() == from_here.read_bytes()
