"""Kernels in CUDA C++ are compiled where there is no GPU. What they compute is tested where there is one:
tests/gpu/test_wide_products.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from unittest import mock

import pytest
import torch

import runtime
from runtime.kernels.gpu.hopper import nvrtc, product
from runtime.kernels.gpu.hopper.nvrtc import CannotCompile, compile_cuda

pytestmark = pytest.mark.skipif(
    PathFinder.find_spec("nvidia") is None, reason="no compiler for CUDA on this kind of machine"
)
# Shared memory that a program of capability 9.0 may have: the CUDA programming guide, "Compute Capabilities".
MAX_SHARED_BYTES = 227 * 1024

# What a step of a model with large matrices needs, compiled ahead and then looked for.
AHEAD = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from runtime.kernels.gpu import binaries
from runtime.kernels.gpu.offline import compiling_for
from runtime.kernels.linear import LinearWeights, silu_linear

def found(rows):
    binary = binaries.find(90, "product", repr((rows, torch.bfloat16)))
    return binary is not None and binary.code.startswith(b"\\x7fELF")

print(found(64), found(256))
with compiling_for(CAPABILITY), FakeTensorMode(), torch.inference_mode():
    weight = torch.empty(28672, 4096, dtype=torch.bfloat16, device="cuda")
    out = silu_linear(torch.empty(100, 4096, dtype=torch.bfloat16, device="cuda"), LinearWeights([weight]))
print(list(out.shape))
print(found(64), found(256))
"""


@pytest.fixture
def no_compiler() -> Iterator[None]:
    nvrtc._library.cache_clear()
    with mock.patch.object(PathFinder, "find_spec", return_value=None):
        yield
    nvrtc._library.cache_clear()


@pytest.mark.parametrize(
    ("rows", "dtype"), [(64, torch.bfloat16), (160, torch.float16), (256, torch.bfloat16)]
)
def test_products_compile_and_fit_into_shared_memory(rows: int, dtype: torch.dtype) -> None:
    binary = product._compile(rows, dtype)
    assert binary.code.startswith(b"\x7fELF")
    assert binary.symbol.encode() in binary.code
    assert binary.shared <= MAX_SHARED_BYTES


def test_a_source_that_is_wrong_is_told() -> None:
    with pytest.raises(CannotCompile, match="nonsense"):
        compile_cuda("nonsense", "sm_90a", {})


@pytest.mark.usefixtures("no_compiler")
def test_without_the_compiler() -> None:
    with pytest.raises(CannotCompile, match="not installed"):
        compile_cuda('extern "C" __global__ void nothing() {}', "sm_90a", {})


@pytest.mark.parametrize(("capability", "there"), [(90, True), (80, False)])
def test_kernels_are_compiled_ahead_for_the_gpus_that_they_are_for(
    capability: int, there: bool, tmp_path: Path
) -> None:
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("no C compiler")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AHEAD.replace("CAPABILITY", str(capability))],
        cwd=Path(runtime.__file__).parents[1], env=environment,
        capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["False False", "[100, 14336]", f"{there} {there}"]
