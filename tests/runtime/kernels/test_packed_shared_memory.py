"""However a product with a quantised weight is cut up, GPUs have the shared memory that its programs take.

Kernels are compiled without a GPU, as far as it takes to know what they need.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
import sys
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.nvidia.compiler import CUDABackend

from runtime.kernels.gpu.offline import compiling_for
from runtime.kernels.gpu.packed_config import tile_bytes, tile_config
from runtime.kernels.packed import ROW_BLOCKS, PackedMatrix
from runtime.kernels.packed_linear import PackedLinear, _size, packed_linear

capability, bits, group, zeros = (int(number) for number in sys.argv[1:])
N, K, FIELD = 8192, 4096, min(64, group)
add_stages, taken = CUDABackend.add_stages, []


def without_assembling(self, stages, *others):
    add_stages(self, stages, *others)
    stages["ptx"] = lambda source, metadata: metadata.update(name="") or ""
    stages["cubin"] = lambda source, metadata: taken.append(metadata["shared"]) or b""


def matrix():
    if bits:
        shape, dtype = (N // ROW_BLOCKS[bits], K * bits // 16 // FIELD, ROW_BLOCKS[bits], FIELD), torch.int16
    else:
        shape, dtype = (N, K), torch.float8_e4m3fn
    values = torch.empty(shape, dtype=dtype, device="cuda")
    scales = torch.empty(K // group, N, dtype=torch.float16, device="cuda")
    points = scales.to(torch.int8) if zeros else None
    return PackedMatrix(values, scales, points, K, group, bits, bits and FIELD)


without = mock.patch.object(CUDABackend, "add_stages", without_assembling)
with compiling_for(capability), FakeTensorMode(), without:
    for rows in (8, 16, 32, 64, 128, 256):
        x = torch.empty(rows, K, dtype=torch.float16, device="cuda")
        packed_linear(x, PackedLinear(matrix()))
        multiprocessors, limit = _size(x.device)
        expected = tile_bytes(matrix(), tile_config(matrix(), rows, multiprocessors, limit))
        assert taken[-1] <= expected <= limit, (rows, taken[-1], expected, limit)
"""

pytestmark = pytest.mark.skipif(
    not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")), reason="no C compiler"
)


@pytest.mark.parametrize(
    ("capability", "bits", "group", "zeros"),
    [
        (90, 4, 128, 1),
        (90, 8, 128, 0),
        (90, 0, 128, 0),
        (80, 4, 128, 0),
        (89, 8, 128, 0),
    ],
)
def test_tiles_take_what_they_are_said_to_and_a_gpu_has(
    capability: int, bits: int, group: int, zeros: int, tmp_path: Path
) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    arguments = [str(number) for number in (capability, bits, group, zeros)]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *arguments],
        env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
