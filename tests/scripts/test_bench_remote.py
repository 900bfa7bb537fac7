"""The stand-in for a model's source, as the genuine clients see it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import BenchError
from harness.remote import KINDS, Remote

from tests.scripts.conftest import BENCH


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like a model's."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for number in (1, 2):
        (folder / f"model-{number:05}-of-00002.safetensors").write_bytes(os.urandom(1_000_000 * number))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_fetched_from_the_stand_in(folder: Path, kind: str) -> None:
    with Remote(folder, "cpu", []) as remote:
        server = remote.server(kind)
        command = [sys.executable, "-m", "handler", "pull", server.command[4], *server.command[-2:]]
        done = subprocess.run(
            command,
            cwd=BENCH.parents[1],
            env={**os.environ, **server.environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        fetched = Path(done.stdout.strip())
        for file in folder.iterdir():
            assert (fetched / file.name).read_bytes() == file.read_bytes()
        remote.forget()
        assert not fetched.exists()


def test_the_genuine_client_of_the_hub_reads_it_too(folder: Path, tmp_path: Path) -> None:
    script = "import sys; from huggingface_hub import snapshot_download as s; print(s('bench/model'))"
    with Remote(folder, "cpu", []) as remote:
        environment = {**os.environ, **remote.server("hub").environment, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    for file in folder.iterdir():
        assert (Path(done.stdout.strip()) / file.name).read_bytes() == file.read_bytes()


def test_its_speed_is_measured_or_refused(folder: Path) -> None:
    with Remote(folder, "cpu", []) as remote:
        assert remote.transfer_seconds() > 0
        (folder / "model-00003-of-00003.safetensors").write_bytes(b"not listed")
        with pytest.raises(BenchError, match="does not send all ranges"):
            remote.transfer_seconds()
