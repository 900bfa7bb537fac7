"""The benchmarks are scripts, not a package: their folder goes on the path as when they are run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
sys.path.insert(0, str(BENCH))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights as the benchmarks make it, with its reference answers."""
    import reference
    from make_model import make

    folder = tmp_path_factory.mktemp("models") / "small"
    make("small", folder, layers=1)
    reference.make(folder, "cpu", "float32").write(folder / "reference.json")
    return folder
