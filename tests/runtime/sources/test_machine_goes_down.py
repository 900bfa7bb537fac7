"""When a machine goes down, files may lie on its disk at their full size, but without their content."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from handler.cli import main
from runtime.weights.sources import SourceError, boot, fetch, locate
from tests.handler.serving import served, until
from tests.runtime.sources.hub_server import HubServer
from tests.runtime.sources.models import NEEDED, contents, model_files, spec
from tests.runtime.sources.s3_server import upload
from tests.runtime.sources.test_arrival import answer
from tests.runtime.sources.test_cold_servers import flags, tokens_of

__all__ = ["answer"]  # a fixture

SPEC = spec("hf://org/name")
FILES = model_files(shards=2)
SHARDS = sorted(name for name in FILES if name.startswith("model-") and name.endswith(".safetensors"))
WANTED = {name: FILES[name] for name in {*NEEDED, *SHARDS, "model.safetensors.index.json"} & FILES.keys()}


@pytest.fixture
def restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The machine starts anew, as far as anybody can tell."""
    current = tmp_path / "boot_id"
    monkeypatch.setattr(boot, "_BOOT_ID", current)

    def restarted() -> None:
        current.write_text(f"{uuid.uuid4()}\n")

    restarted()
    return restarted


def lose(path: Path) -> None:
    """What a file is whose size reached the disk, but not its content."""
    path.write_bytes(bytes(path.stat().st_size))


def that_came(hub: HubServer) -> set[str]:
    """The weights that were asked for since the requests were last cleared."""
    return {
        name for name in SHARDS for request in hub.requests if f"/{name}" in request.path and request.sent
    }


def test_what_the_disk_had_not_got_comes_again_and_nothing_else(
    hub: HubServer, cache_dir: Path, restart: Callable[[], None]
) -> None:
    hub.add_repo("org/name", FILES)
    directory = fetch(SPEC, cache_dir)
    assert locate(SPEC, cache_dir) == directory
    lose(directory / SHARDS[0])
    lose(directory / "tokenizer.json")
    hub.requests.clear()
    restart()
    assert locate(SPEC, cache_dir) is None
    assert fetch(SPEC, cache_dir) == directory
    assert contents(directory) == WANTED
    assert that_came(hub) == {SHARDS[0]}
    assert locate(SPEC, cache_dir) == directory


def test_of_a_download_that_had_not_ended_as_well(
    hub: HubServer, cache_dir: Path, restart: Callable[[], None]
) -> None:
    commit = hub.add_repo("org/name", FILES)
    first = cache_dir / "models" / "hub--org--name" / commit / SHARDS[0]
    hub.fail(f"/{SHARDS[1]}", times=100, status=404, before=lambda: until(first.exists))
    with pytest.raises(SourceError, match=SHARDS[1]):
        fetch(SPEC, cache_dir)
    lose(first)
    hub.mend()
    restart()
    assert contents(fetch(SPEC, cache_dir)) == WANTED


def test_without_a_digest_everything_comes_again(
    s3: Any, cache_dir: Path, restart: Callable[[], None]
) -> None:
    files = {name: FILES[name] for name in WANTED}
    upload(s3, files)
    model = spec("s3://models/org/name")
    directory = fetch(model, cache_dir)
    lose(directory / SHARDS[0])
    restart()
    assert contents(fetch(model, cache_dir)) == files


def test_what_pull_has_brought_is_on_the_disk(
    hub: HubServer, cache_dir: Path, restart: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add_repo("org/name", FILES)
    assert main(["pull", SPEC.source, "--download-dir", str(cache_dir)]) == 0
    restart()
    directory = locate(SPEC, cache_dir)
    assert directory is not None
    assert capsys.readouterr().out.strip() == str(directory)
    assert contents(directory) == WANTED


def test_what_a_server_has_brought_is_there_soon(
    hub: HubServer, tiny_model: Path, cache_dir: Path, answer: list[int], restart: Callable[[], None]
) -> None:
    hub.add_repo("org/name", tiny_model)
    with served(*flags("--download-dir", str(cache_dir))) as server:
        assert tokens_of(server) == answer

        def is_there() -> bool:
            restart()
            return locate(SPEC, cache_dir) is not None

        until(is_there)
