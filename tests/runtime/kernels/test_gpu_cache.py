"""Kernels compiled without a GPU: where they go, that they are found again, that compilations are counted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import runtime

# Compiles a kernel unless it finds it, and says how many were compiled.
COMPILE = """
import sys
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from runtime.kernels.gpu import binaries, cache
from runtime.kernels.gpu.activation import silu_mul
from runtime.kernels.gpu.offline import compiling_for

if sys.argv[1:] == ["image"]:
    triton.knobs.cache.dir = str(binaries.SHIPPED)
with compiling_for(90), FakeTensorMode():
    for rows in (1, 5, 64):
        x = torch.empty(rows, 512, dtype=torch.bfloat16, device="cuda")
        silu_mul(x, torch.empty(rows, 256, dtype=torch.bfloat16, device="cuda"))
assert sum(cache.compiled().values()) == cache.num_compiled()
print(*cache.compiled(), cache.num_compiled())
"""

# Imported before Triton, a kernel's file does without it until the kernel is compiled.
COMPILE_LATE = """
import sys
import torch
from runtime.kernels.gpu.activation import silu_mul
assert "triton" not in sys.modules
""" + COMPILE.replace("import triton\n", "")

# Looks for what was compiled as a launch does, with arguments of the same kinds as those, or of others.
FIND = """
import sys
import torch
from runtime.kernels.gpu import binaries
from runtime.kernels.gpu.activation import _gated_kernel


class Argument:
    dtype = torch.bfloat16

    def __init__(self, address):
        self.address = address

    def data_ptr(self):
        return self.address


def found(address, n):
    arguments = Argument(address), Argument(1024)
    constants = {"N": n, "BLOCK": 1024, "GELU": False, "num_warps": 4}
    key = _gated_kernel.key(arguments, {**constants, "EARLY": True, "launch_pdl": True})
    return binaries.find(90, _gated_kernel.name, key)


binary = found(512, 256)
print(binary.symbol, binary.code[:4], binary.formats, *binary.passed, binary.early)
print(found(512, 257), found(514, 256))
print("triton" in sys.modules)
"""

pytestmark = pytest.mark.skipif(
    not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")), reason="no C compiler"
)


def run_in(site: Path, users_cache: Path, script: str, *arguments: str) -> str:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(users_cache), "PYTHONPATH": str(site)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=site, env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_an_image_ships_is_found_wherever_the_image_has_it(tmp_path: Path) -> None:
    built, shipped, users_cache = (tmp_path / name for name in ("built", "shipped", "cache"))
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(runtime.__file__).parent, built / "runtime", ignore=ignored)
    assert run_in(built, users_cache, COMPILE, "image") == "_gated_kernel 1"
    assert not users_cache.exists()
    kept = {file.suffix for file in (built / "runtime/kernels/gpu/compiled").rglob("_gated_kernel.*")}
    assert kept == {".cubin", ".json", ".source"}

    launchers = list((built / "runtime/kernels/gpu/compiled").rglob("*.so"))
    assert launchers
    assert all(b"libcuda.so.1\0" in launcher.read_bytes() for launcher in launchers)

    built.rename(shipped)
    for path in shipped.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert run_in(shipped, users_cache, COMPILE) == "0"
    assert not list(users_cache.rglob("*.cubin"))


@pytest.mark.parametrize("compile_it", [COMPILE, COMPILE_LATE])
def test_what_was_compiled_is_found_without_the_compiler(tmp_path: Path, compile_it: str) -> None:
    site = Path(runtime.__file__).parents[1]
    assert run_in(site, tmp_path, compile_it) == "_gated_kernel 1"
    assert run_in(site, tmp_path, FIND).splitlines() == [
        "_gated_kernel b'\\x7fELF' QQ 0 1 True",
        "None None",
        "False",
    ]


def test_what_is_damaged_is_made_anew(tmp_path: Path) -> None:
    site = Path(runtime.__file__).parents[1]
    run_in(site, tmp_path, COMPILE)
    (kept,) = tmp_path.glob("launches-*/_gated_kernel-*")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:20])
    assert run_in(site, tmp_path, COMPILE) == "0"
    assert kept.read_bytes() == whole
