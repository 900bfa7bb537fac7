"""The shape of the house: what lies where, who may import whom, and how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 400
TOP_LEVEL = {
    *("pyproject.toml", "README.md", "models.yaml", "Containerfile", "LICENSE"),
    *("handler", "runtime", "scripts", "tests"),
}
# What building and installing leave behind, none of which is in the repository.
LEFT_BEHIND = ("firstlight.egg-info", "build", "dist", "__pycache__")

# The rooms of runtime/ from the ground up: each may use what stands before it.
ROOMS = [
    "runtime.errors",
    "runtime.marks",
    "runtime.spawn",
    "runtime.compiled",
    "runtime.yamlfile",
    "runtime.weights.sources",
    "runtime.catalogue",
    "runtime.protocol",
    "runtime.text",
    "runtime.kernels",
    "runtime.parallel",
    "runtime.model",
    "runtime.weights",
    "runtime.token_stream",
    "runtime.processes",
    "runtime.client",
    "runtime.llm",
    "runtime.engine",
]
# A source that finds weights in another format hands them to the converter next door.
ALSO_ALLOWED = {("runtime.weights.sources", "runtime.weights")}
ROOMS_OF_THE_HANDLER = {
    "runtime.errors",
    "runtime.marks",
    "runtime.spawn",
    "runtime.catalogue",
    "runtime.protocol",
    "runtime.processes",
    "runtime.client",
    "runtime.text",
    "runtime.weights.sources",
}
HEAVY = {"torch", "transformers", "triton"}
# The kernels' files have Triton from `language.py`, which puts its import off; these are about compiling.
AT_THE_COMPILER = {"runtime.kernels.gpu.cache", "runtime.kernels.gpu.offline"}
# The parts of runtime/ that work before torch is there, or where it never is.
TORCH_FREE = (
    *sorted(ROOMS_OF_THE_HANDLER),
    "runtime.yamlfile",
    "runtime.model.config",
    "runtime.model.families",
    "runtime.parallel.control",
    "runtime.parallel.ranks",
    "runtime.weights.checkpoint",
    "runtime.weights.plan",
)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for top in ("handler", "runtime") for file in (ROOT / top).rglob("*.py")}


def imports(module: str) -> set[str]:
    """The modules that `module` imports, at the top or later on; what only type checkers see aside."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in walk_what_runs(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import; write the whole name"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in MODULES else str(node.module))
    return found


def walk_what_runs(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            for otherwise in child.orelse:
                yield from walk_what_runs(otherwise)
        else:
            yield from walk_what_runs(child)


def room_of(module: str) -> str:
    rooms = [room for room in ROOMS if within(module, room)]
    assert rooms, f"{module} belongs to no room: give it a place in ROOMS, and in the design"
    return max(rooms, key=len)


def modules_in(package: str) -> list[str]:
    return sorted(module for module in MODULES if within(module, package))


def test_top_level_holds_only_what_belongs_there() -> None:
    names = {entry.name for entry in ROOT.iterdir() if not entry.name.startswith(".")}
    assert names.difference(LEFT_BEHIND) == TOP_LEVEL


@pytest.mark.parametrize("top", ["handler", "runtime"])
def test_no_file_is_too_long(top: str) -> None:
    written = {".py", ".c", ".h", ".cu", ".html", ".css", ".js"}
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for file in (ROOT / top).rglob("*")
        if file.suffix in written
    }
    assert {file: lines for file, lines in lengths.items() if lines > MAX_LINES} == {}


class TestImports:
    @pytest.mark.parametrize("module", [name for name in modules_in("runtime") if name != "runtime"])
    def test_runtime_points_downward(self, module: str) -> None:
        room = room_of(module)
        above = {
            name
            for name in imports(module)
            if within(name, "runtime")
            and name != "runtime"
            and ROOMS.index(room_of(name)) > ROOMS.index(room)
            and (room, room_of(name)) not in ALSO_ALLOWED
        }
        assert above == set()

    @pytest.mark.parametrize("module", modules_in("runtime"))
    def test_runtime_knows_no_http(self, module: str) -> None:
        assert {name.partition(".")[0] for name in imports(module)}.isdisjoint(
            {"handler", "starlette", "uvicorn"}
        )

    @pytest.mark.parametrize("module", modules_in("handler"))
    def test_handler_enters_only_rooms_without_torch(self, module: str) -> None:
        used = {name for name in imports(module) if within(name, "runtime")}
        assert {name for name in used if room_of(name) not in ROOMS_OF_THE_HANDLER} == set()
        assert {name.partition(".")[0] for name in imports(module)}.isdisjoint(HEAVY)

    @pytest.mark.parametrize("module", [*modules_in("runtime.text"), *modules_in("runtime.weights.sources")])
    def test_text_and_sources_never_import_torch(self, module: str) -> None:
        assert {name.partition(".")[0] for name in imports(module)}.isdisjoint(HEAVY)

    @pytest.mark.parametrize("module", sorted({*modules_in("runtime.kernels.gpu")} - AT_THE_COMPILER))
    def test_kernels_are_written_without_the_compiler(self, module: str) -> None:
        assert {name.partition(".")[0] for name in imports(module)}.isdisjoint({"triton"})

    def test_no_circles(self) -> None:
        graph = {module: imports(module) & MODULES.keys() - {module} for module in MODULES}
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail(" <- ".join(error.args[1]))


def loaded_after_importing(modules: list[str]) -> set[str]:
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


class TestLoaded:
    """What really is in `sys.modules`, whoever brought it there."""

    def test_handler(self) -> None:
        modules = [name for name in modules_in("handler") if not name.endswith("__main__")]
        assert {"handler.cli", "handler.app"} <= set(modules)
        assert loaded_after_importing(modules) & HEAVY == set()

    def test_torch_free_rooms(self) -> None:
        modules = [module for package in TORCH_FREE for module in modules_in(package)]
        assert loaded_after_importing(modules) & HEAVY == set()
