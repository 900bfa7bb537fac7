"""The image that `Containerfile` describes: its steps are run one after the other in a folder that stands
for the root, and what comes out serves. Steps that change the machine itself are left out."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATHS = ("/opt/", "/models", "/src", "/run/secrets", "/tmp")
# They install packages of the system, make a user, and compile the library that Python came with.
OF_THE_MACHINE = (
    "apt-get ",
    "useradd ",
    'python -m compileall -q --invalidation-mode unchecked-hash "$(python',
)


@dataclass
class Stage:
    """What a stage hands on to those that begin with it."""

    env: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"


class Image:
    """Runs the instructions. All stages share one root, so copying from a stage has nothing to do."""

    def __init__(self, root: Path, **arguments: str) -> None:
        self.root = root
        self.entry: list[str] = []
        self._given = arguments
        self._stages: dict[str, Stage] = {}
        self._stage = Stage()
        self._arguments: dict[str, str] = {}
        for place in PATHS:
            self._inside(place).mkdir(parents=True, exist_ok=True)

    def build(self, text: str) -> None:
        """Run every instruction of a Containerfile."""
        lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
        for line in re.sub(r"\\\n\s*", " ", lines).splitlines():
            if line.strip():
                name, _, rest = line.partition(" ")
                getattr(self, f"_{name.lower()}")(rest.strip())

    def environment(self) -> dict[str, str]:
        """What the last stage's commands see."""
        known = {**os.environ, **self._arguments, "PIP_NO_BUILD_ISOLATION": "1"}
        known.pop("PYTHONPATH", None)
        path = f"{self.root}/opt/firstlight/bin:{os.environ['PATH']}"
        return {**known, **self._stage.env, "PATH": path}

    def run(self, command: str) -> None:
        """A command in the stage's working directory. Fails the test if it fails."""
        done = subprocess.run(
            ["sh", "-e", "-c", self._rewritten(command)],
            env=self.environment(), cwd=self._inside(self._stage.workdir),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"

    def _inside(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def _rewritten(self, text: str) -> str:
        text = re.sub(rf"(?<![\w/.-])(?={'|'.join(PATHS)})", str(self.root), text)
        return re.sub(r"\bcd /(?= )", f"cd {self.root}", text)

    def _from(self, rest: str) -> None:
        base, _, name = rest.partition(" AS ")
        before = self._stages.get(base, Stage())
        self._stage = Stage(dict(before.env), before.workdir)
        self._stages[name] = self._stage
        self._arguments = {}

    def _arg(self, rest: str) -> None:
        name, _, default = rest.partition("=")
        self._arguments[name] = self._given.get(name, default.strip('"'))

    def _env(self, rest: str) -> None:
        for pair in shlex.split(rest):
            name, _, value = pair.partition("=")
            value = self._rewritten(value)
            self._stage.env[name] = re.sub(r"\$\{(\w+)\}", lambda found: self._arguments[found[1]], value)

    def _workdir(self, rest: str) -> None:
        self._stage.workdir = rest

    def _copy(self, rest: str) -> None:
        if rest.startswith("--from="):
            return
        *sources, target = rest.split()
        into = self._inside(self._stage.workdir)
        for source in sources:
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.so", "compiled")
                shutil.copytree(ROOT / source, into / target, ignore=ignored)
            else:
                shutil.copy(ROOT / source, into)

    def _run(self, rest: str) -> None:
        command = re.sub(r"^(--mount=\S+\s+)+", "", rest)
        if not command.startswith(OF_THE_MACHINE):
            self.run(command)
        if command.startswith("python -m venv"):
            # What pip would download is here already; pip finds it there, and says so.
            (found,) = self._inside("/opt/firstlight/lib").glob("python*/site-packages")
            here = sysconfig.get_path("purelib")
            (found / "here.pth").write_text(f"import sys; sys.path.insert(0, {here!r})\n")

    def _user(self, rest: str) -> None:
        assert rest.split(":")[0] not in ("0", "root")

    def _expose(self, rest: str) -> None:
        pass

    def _entrypoint(self, rest: str) -> None:
        self.entry = shlex.split(re.sub(r"[\[\],]", " ", rest))

    def _cmd(self, rest: str) -> None:
        self.entry += shlex.split(re.sub(r"[\[\],]", " ", rest))


def contents(root: Path) -> dict[str, tuple[int, int]]:
    """Every file that a running container must leave alone, with its size and time."""
    files = (path for path in (root / "opt").rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.mark.slow
def test_the_steps_of_the_image_make_a_server_that_compiles_and_writes_nothing(
    tiny_model: Path, tmp_path: Path
) -> None:
    image = Image(tmp_path, MODEL=str(tiny_model), WEIGHTS="baked", DEVICE="cpu")
    image.build((ROOT / "Containerfile").read_text())
    (site,) = (tmp_path / "opt/firstlight/lib").glob("python*/site-packages")

    # Bytecode that is never checked against its source: bit 0 of the flags is set, bit 1 is not (PEP 552).
    for source in (site / "runtime").rglob("*.py"):
        (compiled,) = (source.parent / "__pycache__").glob(f"{source.stem}.cpython-*.pyc")
        assert compiled.read_bytes()[4:8] == b"\1\0\0\0", source
    assert list((site / "runtime/kernels").glob("cpu-*.so"))

    before = contents(tmp_path)
    command = [str(tmp_path / "opt/firstlight/bin" / image.entry[0]), *image.entry[1:]]
    environment = {**image.environment(), "HOST": "127.0.0.1", "PORT": "0"}
    server = subprocess.Popen(
        command, env=environment, cwd=tmp_path / "tmp", stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stderr is not None
        said = server.stderr.readline()
        url = re.search(r"http://\S+?(?= )", said)
        assert url, said
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{url[0]}/health/ready") as answer:
                    assert answer.status == 200
                    break
            except OSError:
                time.sleep(0.1)
        else:
            pytest.fail("the server did not become ready")
    finally:
        server.terminate()
        rest = server.communicate(timeout=30)[1]
    assert server.returncode == 0, rest
    assert contents(tmp_path) == before
    assert not list((tmp_path / "tmp/cache").rglob("*.so"))
