"""What a start puts off of torch's import, and that nothing of it is missing afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def python(code: str, path: Path = ROOT) -> str:
    """What `code` prints, in a process that looks for packages in `path` first."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"},
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_computes_without_what_is_deferred() -> None:
    left_out = python("""
import sys
from runtime.engine.deferred import DEFERRED, import_torch
import_torch()
import torch
with torch.inference_mode():
    a = torch.randn(64, 64).bfloat16()
    assert torch.nn.functional.silu(a @ a).shape == (64, 64)
    assert torch.nn.functional.scaled_dot_product_attention(a[None], a[None], a[None]).isfinite().all()
print(*(name for name in DEFERRED if type(sys.modules[name]).__name__ == "_Deferred"))
print(*{"torch._decomp", "torch._refs", "torch._prims", "torch._dynamo", "sympy"} & set(sys.modules))
""")
    from runtime.engine.deferred import DEFERRED

    assert left_out.splitlines() == [" ".join(DEFERRED), ""]


# Says what a process can do with torch in which nothing was deferred.
EVERYTHING = """
def everything():
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    meta = torch.empty(4, 6, device="meta")
    with FakeTensorMode():
        fake = torch.nn.functional.conv2d(torch.empty(2, 3, 8, 8), torch.empty(5, 3, 3, 3))
    exported = torch.export.export(torch.nn.Linear(4, 3), (torch.ones(2, 4),))
    normal = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    return [
        tuple(torch.linalg.lu_factor(meta)[0].shape),
        tuple(fake.shape),
        sorted(node.op for node in exported.graph.nodes),
        round(normal.log_prob(torch.ones(())).item(), 5),
        torch.vmap is torch.func.vmap,
        torch.vmap(torch.dot)(torch.ones(2, 3), torch.ones(2, 3)).tolist(),
        torch.cond is __import__("torch._higher_order_ops", fromlist=["cond"]).cond,
        torch.lobpcg is __import__("torch._lobpcg", fromlist=["lobpcg"]).lobpcg,
    ]
"""
SAY = """
import sys
print(sorted(name for name in sys.modules if name[:5] == "torch"))
print(everything())
"""


def test_afterwards_everything_is_as_in_a_process_that_deferred_nothing() -> None:
    plain = python(f"{EVERYTHING}\nimport torch{SAY}")
    later = python(
        f"""{EVERYTHING}
import sys
from runtime.engine.deferred import import_the_rest, import_torch
import_torch()
import_the_rest(){SAY}
assert not any(type(module).__name__ == "_Deferred" for module in sys.modules.values())
assert not any(type(finder).__module__.startswith("runtime") for finder in sys.meta_path)
"""
    )
    assert later == plain


def test_each_deferred_module_comes_when_it_is_asked_for() -> None:
    """One process for each, forked after torch's import, so that none finds another's work done."""
    found = python("""
import importlib, os, sys
from runtime.engine.deferred import DEFERRED, import_torch
import_torch()
import torch
asks = {name: (lambda name=name: dir(sys.modules[name]) and sys.modules[name].asked_for) for name in DEFERRED}
asks["import"] = lambda: importlib.import_module("torch.ao.nn.quantized").Linear
asks["from"] = lambda: exec("from torch.export import ExportedProgram; ExportedProgram.module")
asks["call"] = lambda: torch.vmap(torch.dot)(torch.ones(2, 3), torch.ones(2, 3))
asks["transformers"] = lambda: importlib.import_module("transformers")
asks["dynamo"] = lambda: importlib.import_module("torch._dynamo")
for name, ask in asks.items():
    if (child := os.fork()) == 0:
        try:
            ask()
        except AttributeError as error:
            assert "asked_for" in str(error), error
        left = [n for n in DEFERRED if type(sys.modules[n]).__name__ == "_Deferred"]
        if name in ("transformers", "dynamo"):
            assert left == [], left
        assert name not in left
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print("could not be had:", name)
""")
    assert found == ""


def test_another_release_of_torch_is_imported_as_it_is() -> None:
    counts = python("""
import sys
from runtime.engine import deferred
deferred.TESTED = ((1, 0), (1, 13))
deferred.import_torch()
assert "torch" not in sys.modules
import torch
print(sum(type(module).__name__ == "_Deferred" for module in sys.modules.values()))
""")
    assert counts == "0\n"


def test_a_torch_that_cannot_do_without_is_imported_as_a_whole(tmp_path: Path) -> None:
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "version.py").write_text("__version__ = '2.12.0'\n")
    (torch / "export.py").write_text("")
    (torch / "__init__.py").write_text("""
import sys
import torch.export
if type(sys.modules["torch.export"]).__name__ == "_Deferred":
    raise ImportError("cannot do without")
""")
    code = "from runtime.engine import deferred; deferred.import_torch(); import torch; print(torch.__file__)"
    assert python(code, tmp_path) == f"{torch / '__init__.py'}\n"
