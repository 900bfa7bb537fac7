"""What the tests of the compiled CPU kernels share."""

from __future__ import annotations

import shutil

import pytest

from runtime.kernels import native

# Where there is a compiler, kernels that cannot be built are a failure: the tests run, and say so.
needs_kernels = pytest.mark.skipif(
    native.library() is None and not any(map(shutil.which, ("cc", "gcc", "clang"))),
    reason="no C compiler, so no compiled kernels",
)
