"""The Hub, of which there is a stand-in: what is fetched, what is refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # lazy there

from runtime.weights.sources import FetchProgress, SourceError, fetch, locate, transfer
from tests.runtime.sources.hub_server import HubServer
from tests.runtime.sources.models import NEEDED, contents, model_files, spec

SPEC = spec("hf://org/name")


def _fails(cache_dir: Path, source: str = "hf://org/name", revision: str | None = None) -> SourceError:
    with pytest.raises(SourceError) as caught:
        fetch(spec(source, revision), cache_dir)
    return caught.value


def test_only_what_a_model_needs_is_fetched(hub: HubServer, cache_dir: Path) -> None:
    files = model_files()
    commit = hub.add_repo("org/name", files)
    directory = fetch(SPEC, cache_dir)
    assert contents(directory) == {name: files[name] for name in NEEDED}
    assert directory == cache_dir / "models" / "hub--org--name" / commit
    assert not list(cache_dir.rglob("*.partial"))


def test_ranges_get_smaller_towards_the_end(
    hub: HubServer, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in {"RANGE_BYTES": 200_000, "LAST_RANGE_BYTES": 20_000, "BLOCK_BYTES": 10_000}.items():
        monkeypatch.setattr(transfer, name, size)
    size = 10_000_001
    hub.add_repo("org/name", model_files(size))
    fetch(SPEC, cache_dir)
    asked = [r.range for r in hub.requests if "/storage/" in r.path and r.range]
    ranges = sorted([int(text) for text in each.removeprefix("bytes=").split("-")] for each in asked)
    assert [start for start, _ in ranges] == [0, *(last + 1 for _, last in ranges[:-1])]
    assert ranges[-1][1] == size - 1
    sizes = [last + 1 - start for start, last in ranges]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 200_000
    assert all(start % 10_000 == 0 for start, _ in ranges)


def test_a_long_listing_comes_in_pages(hub: HubServer, cache_dir: Path) -> None:
    files = model_files(50_000, shards=3)
    hub.add_repo("org/name", files)
    hub.page_size = 2
    assert {name for name in contents(fetch(SPEC, cache_dir)) if name.startswith("model-0")} == {
        name for name in files if name.startswith("model-0")
    }


def test_a_fetch_waits_for_no_client(hub: HubServer, cache_dir: Path) -> None:
    hub.add_repo("org/name", model_files())
    script = """
import json, sys
from pathlib import Path
from runtime.catalogue import ModelSpec
from runtime.weights.sources import fetch
fetch(ModelSpec(id="m", source="hf://org/name"), Path(sys.argv[1]))
print(json.dumps(sorted(sys.modules)))
"""
    output = subprocess.run(
        [sys.executable, "-c", script, str(cache_dir)], capture_output=True, text=True, check=True
    ).stdout
    assert {"huggingface_hub.hf_api", "huggingface_hub.utils", "httpx", "requests"}.isdisjoint(
        json.loads(output)
    )


def test_shards_come_as_the_index_names_them(hub: HubServer, cache_dir: Path) -> None:
    files = model_files(50_000, shards=3)
    hub.add_repo("org/name", {**files, "model-extra.safetensors": b"not in the index"})
    fetched = contents(fetch(SPEC, cache_dir))
    assert {name for name in fetched if name.endswith(".safetensors")} == {
        name for name in files if name.startswith("model-0")
    }


def test_a_warm_start_makes_no_request(hub: HubServer, cache_dir: Path) -> None:
    hub.add_repo("org/name", model_files())
    assert locate(SPEC, cache_dir) is None
    directory = fetch(SPEC, cache_dir)
    hub.requests.clear()
    assert locate(SPEC, cache_dir) == directory
    assert not hub.requests


def test_a_pinned_commit_is_fetched_once_and_never_asked_for_again(hub: HubServer, cache_dir: Path) -> None:
    commit = hub.add_repo("org/name", model_files())
    hub.add_repo("org/name", model_files(seed=1))
    pinned = spec("hf://org/name", commit)
    directory = fetch(pinned, cache_dir)
    assert b'"seed": 0' in (directory / "config.json").read_bytes()
    hub.requests.clear()
    assert fetch(pinned, cache_dir) == directory == locate(spec(f"hf://org/name@{commit}"), cache_dir)
    assert not hub.requests


def test_fetching_again_follows_the_branch(hub: HubServer, cache_dir: Path) -> None:
    hub.add_repo("org/name", model_files())
    old = fetch(SPEC, cache_dir)
    hub.add_repo("org/name", model_files(seed=1))
    assert locate(SPEC, cache_dir) == old
    new = fetch(SPEC, cache_dir)
    assert new != old
    assert locate(SPEC, cache_dir) == new


def test_a_damaged_entry_is_not_located_and_is_mended(hub: HubServer, cache_dir: Path) -> None:
    files = model_files()
    hub.add_repo("org/name", files)
    directory = fetch(SPEC, cache_dir)
    (directory / "model.safetensors").write_bytes(b"cut")
    assert locate(SPEC, cache_dir) is None
    fetch(SPEC, cache_dir)
    assert (directory / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_snapshot_in_the_clients_own_cache_is_used_in_place(hub: HubServer, cache_dir: Path) -> None:
    hub.add_repo("org/name", model_files())
    snapshot = Path(
        huggingface_hub.snapshot_download("org/name", endpoint=hub.url, cache_dir=_client_cache())
    )
    hub.requests.clear()
    assert locate(SPEC, cache_dir) == snapshot
    assert not hub.requests
    assert fetch(SPEC, cache_dir) == snapshot
    assert hub.body_bytes("/resolve/") == 0


@pytest.mark.parametrize("lost", ["generation_config.json", "model.safetensors"])
def test_a_partial_snapshot_of_the_client_is_not_taken_for_a_model(
    hub: HubServer, cache_dir: Path, lost: str
) -> None:
    hub.add_repo("org/name", model_files())
    snapshot = Path(
        huggingface_hub.snapshot_download("org/name", endpoint=hub.url, cache_dir=_client_cache())
    )
    (snapshot / lost).unlink()
    assert locate(SPEC, cache_dir) is None
    assert lost in contents(fetch(SPEC, cache_dir))


def _client_cache() -> str:
    return os.path.join(os.environ["HF_HOME"], "hub")


def test_the_directory_is_known_while_the_weights_still_come(hub: HubServer, cache_dir: Path) -> None:
    files = model_files(1_000_000)
    hub.add_repo("org/name", files)
    seen_text = threading.Event()
    hub.fail("/storage/", pause=lambda: seen_text.wait(30))
    early: list[set[str]] = []

    def on_progress(progress: FetchProgress) -> None:
        if progress.directory and not early:
            early.append(set(contents(progress.directory)))
            seen_text.set()

    directory = fetch(SPEC, cache_dir, on_progress)
    assert early == [NEEDED - {"model.safetensors"}]
    assert set(contents(directory)) == NEEDED


def test_progress_ends_at_the_total_and_never_falls(hub: HubServer, cache_dir: Path) -> None:
    files = model_files(200_000, shards=3)
    hub.add_repo("org/name", files)
    seen: list[FetchProgress] = []
    directory = fetch(SPEC, cache_dir, seen.append)
    done = [progress.bytes_done for progress in seen]
    assert done == sorted(done)
    total = sum(len(content) for content in contents(directory).values())
    assert (seen[-1].bytes_done, seen[-1].bytes_total, seen[-1].directory) == (total, total, directory)


# ---- the token ---------------------------------------------------------------------------------


def test_the_token_goes_to_the_hub_and_nowhere_else(
    hub: HubServer,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    hub.add_repo("org/name", model_files(), token="hf_verysecret")
    with caplog.at_level(logging.DEBUG):
        fetch(SPEC, cache_dir)
    to_hub = [r for r in hub.requests if r.host.startswith("127.0.0.1") and "/org/name" in r.path]
    to_storage = [r for r in hub.requests if r.host.startswith("localhost")]
    assert to_storage
    assert {r.authorization for r in to_hub} == {"Bearer hf_verysecret"}
    assert {r.authorization for r in to_storage} == {None}
    output = capfd.readouterr()
    assert "hf_verysecret" not in caplog.text + output.out + output.err
    assert not any(b"hf_verysecret" in p.read_bytes() for p in cache_dir.rglob("*") if p.is_file())


@pytest.mark.parametrize("way", ["its file", "the environment", "an older name in the environment"])
def test_the_token_is_found_where_the_client_finds_it(
    hub: HubServer, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str
) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    if way == "its file":
        (tmp_path / "token").write_text("hf_secret\n")
    else:
        monkeypatch.setenv(
            "HF_TOKEN" if way == "the environment" else "HUGGING_FACE_HUB_TOKEN", " hf_secret\n"
        )
    hub.add_repo("org/name", model_files(), token="hf_secret")
    fetch(SPEC, cache_dir)
    assert {r.authorization for r in hub.requests} >= {"Bearer hf_secret"}
    assert build_hf_headers()["authorization"] == "Bearer hf_secret"
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    shutil.rmtree(cache_dir)
    assert _fails(cache_dir).kind == "not_found"


# ---- what is said to people --------------------------------------------------------------------


def test_a_missing_repository(hub: HubServer, cache_dir: Path) -> None:
    error = _fails(cache_dir, "hf://org/nonesuch")
    assert error.kind == "not_found"
    assert "hf://org/nonesuch" in str(error)
    assert "HF_TOKEN" in str(error)


def test_a_missing_revision(hub: HubServer, cache_dir: Path) -> None:
    hub.add_repo("org/name", model_files())
    error = _fails(cache_dir, "hf://org/name@v9")
    assert error.kind == "revision"
    assert "org/name@v9" in str(error)


def test_a_gated_repository(hub: HubServer, cache_dir: Path) -> None:
    hub.add_repo("org/name", model_files(), gated=True, token="hf_other")
    error = _fails(cache_dir)
    assert error.kind == "gated"
    assert f"{hub.url}/org/name" in str(error)
    assert "HF_TOKEN" in str(error)


def test_no_network(hub: HubServer, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A port that is bound but not listened on refuses connections and is nobody else's.
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{bound.getsockname()[1]}")
        error = _fails(cache_dir)
    assert error.kind == "network"
    assert "HF_ENDPOINT" in str(error)


def test_offline_mode_uses_the_cache_and_says_so_when_it_cannot(
    hub: HubServer, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("org/name", model_files())
    directory = fetch(SPEC, cache_dir)
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(SPEC, cache_dir) == directory
    shutil.rmtree(cache_dir)
    error = _fails(cache_dir)
    assert error.kind == "network"
    assert "HF_HUB_OFFLINE" in str(error)
    assert not hub.requests


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"README.md": b"x"}, "no config.json"),
        ({"config.json": b"{}"}, "no weights"),
        ({"config.json": b"{}", "model.gguf": b"x"}, "GGUF"),
        ({"config.json": b"{}", "model.safetensors.index.json": b"{"}, "not readable"),
        (
            {
                "config.json": b"{}",
                "model.safetensors.index.json": b'{"weight_map": {"a": "../../x.safetensors"}}',
            },
            "../../x.safetensors",
        ),
        (
            {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "m.safetensors"}}'},
            "m.safetensors",
        ),
    ],
)
def test_what_is_no_model_is_said_to_be_none(
    hub: HubServer, cache_dir: Path, files: dict[str, bytes], says: str
) -> None:
    hub.add_repo("org/name", files)
    error = _fails(cache_dir)
    assert error.kind == "invalid"
    assert says in str(error)
    assert locate(SPEC, cache_dir) is None


def test_two_revisions_that_contradict_each_other(cache_dir: Path) -> None:
    error = _fails(cache_dir, "hf://org/name@a", "b")
    assert error.kind == "invalid"
    assert "Keep one" in str(error)
