"""What a start imports, up to its first token: every newcomer has to have a reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from tests.runtime.weights.conftest import write_model

ROOT = Path(__file__).parents[3]
# Starts an engine as its process does, answers one request, and says what has been imported by then.
FIRST_TOKEN = """
import sys
before = set(sys.modules)
from runtime.catalogue import ModelSpec
from runtime.engine.deferred import DEFERRED
from runtime.engine.start import start
from runtime.protocol import EngineConfig, SamplingParams, Submit

config = EngineConfig(model=ModelSpec(id="m", source=sys.argv[1]), cache_dir=sys.argv[2], device="cpu")
engine, *_ = start(config, lambda event: None)
engine.submit(Submit(request_id="r", prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=2)))
while engine.has_work:
    engine.step()
packages = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
print(*(name for name in packages if not name.startswith("_")))
print(*(name for name in DEFERRED if type(sys.modules[name]).__name__ == "_Deferred"))
print(*sys.modules)
"""
PACKAGES = {
    "runtime",
    "msgspec",
    "torch",
    # Torch's import brings these along.
    "numpy",
    "typing_extensions",
    "torchgen",
    "tqdm",
}


def test_a_start_imports_what_its_first_token_needs(tmp_path: Path) -> None:
    write_model(tmp_path, torch.float32)
    done = subprocess.run(
        [sys.executable, "-c", FIRST_TOKEN, str(tmp_path), str(tmp_path / "cache")],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    packages, deferred, modules = (set(line.split()) for line in done.stdout.splitlines())
    from runtime.engine.deferred import DEFERRED

    assert packages - PACKAGES == set()
    assert set(DEFERRED) - deferred == set()
    assert {"torch._dynamo", "torch._inductor", "torch._decomp", "torch._refs"} & modules == set()
