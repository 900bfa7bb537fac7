"""Where the compiled CPU kernels come from: a cache, an image, a compiler, or nowhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import runtime

# Runs the kernel that multiplies by the SiLU, and says which library did it.
USE = """
import numpy as np
from runtime.kernels import native
library = native.library()
if library is None:
    print(None)
else:
    gate_up = np.linspace(-3, 3, 64, dtype=np.float32).reshape(2, 32)
    out = np.empty((2, 16), np.float32)
    library.silu_mul(gate_up.ctypes.data, 2, 16, out.ctypes.data)
    gate, up = gate_up[:, :16], gate_up[:, 16:]
    np.testing.assert_allclose(out, gate / (1 + np.exp(-gate)) * up, rtol=1e-5)
    print(native.build())
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A copy of the package, as an image has it."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(Path(runtime.__file__).parent, tmp_path / "site" / "runtime", ignore=ignored)
    return tmp_path / "site"


def _python(site: Path, *arguments: str, compiler: bool) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(site / "cache")}
    if not compiler:
        environment["PATH"] = str(site / "no-programs")
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, check=True)


needs_compiler = pytest.mark.skipif(
    not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")), reason="no C compiler"
)


@needs_compiler
def test_built_ahead_of_time_the_kernels_need_no_compiler_later(installed: Path) -> None:
    built = _python(installed, "-m", "runtime.kernels.native", compiler=True).stdout.strip()
    assert Path(built).parent == installed / "cache" / "firstlight" / "kernels"
    assert _python(installed, "-c", USE, compiler=False).stdout.strip() == built


@needs_compiler
def test_an_image_carries_kernels_for_the_processors_that_may_run_it(installed: Path) -> None:
    built = _python(installed, "-m", "runtime.kernels.native", "image", compiler=True).stdout.split()
    assert {Path(path).parent for path in built} == {installed / "runtime" / "kernels"}
    used = _python(installed, "-c", USE, compiler=False)
    assert (used.stdout.strip() in built, used.stderr) == (True, "")
    assert not (installed / "cache").exists()
    # Kernels of another source are not taken for these.
    source = installed / "runtime" / "kernels" / "cpu" / "vectors.h"
    source.write_text(source.read_text() + "\n/* changed */\n")
    assert _python(installed, "-c", USE, compiler=False).stdout.strip() == "None"


def test_without_a_compiler_it_says_so_and_goes_on(installed: Path) -> None:
    built = _python(installed, "-m", "runtime.kernels.native", compiler=False)
    assert built.stdout.strip() == "None"
    assert "no C compiler found" in built.stderr
    assert _python(installed, "-c", USE, compiler=False).stdout.strip() == "None"
