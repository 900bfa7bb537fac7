"""The Hub when things go wrong on the way: cuts, resets, stalls, 503s, lies about ranges, wrong bytes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from runtime.weights.sources import FetchProgress, SourceError, fetch, locate
from runtime.weights.sources import transfer as transfer_module
from tests.runtime.sources.hub_server import HubServer
from tests.runtime.sources.models import NEEDED, contents, model_files, spec

SPEC = spec("hf://org/name")


def _fails(cache_dir: Path) -> SourceError:
    with pytest.raises(SourceError) as caught:
        fetch(SPEC, cache_dir)
    return caught.value


# ---- faults that another try mends -------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        {"match": "/storage/", "cut_after": 100_000, "times": 2},
        {"match": "/storage/", "status": 503, "times": 3},
        {"match": "/storage/", "status": 403, "times": 1},
        {"match": "/resolve/", "status": 429, "headers": {"Retry-After": "0"}, "times": 3},
        {"match": "/revision/", "status": 500, "times": 2},
        {"match": "/storage/", "corrupt": True, "times": 1},
        {"match": "config.json", "corrupt": True, "times": 1},
        {"match": "/storage/", "ignore_range": True, "times": 100},
        {"match": "/storage/", "ignore_range": True, "times": 1},
        {"match": "/storage/", "reset_after": 50_000, "times": 5},
        {"match": "/resolve/", "reset_after": 0, "times": 2},
        {"match": "/storage/", "lie": "elsewhere", "times": 5},
        {"match": "/storage/", "lie": "unlabelled", "times": 5},
        {"match": "/storage/", "lie": "longer", "times": 100},
        {"match": "/storage/", "lie": "shorter", "times": 10},
    ],
    ids=lambda fault: "-".join(str(value) for value in fault.values()),
)
def test_passing_faults_are_mended(
    hub: HubServer, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, fault: dict[str, object]
) -> None:
    monkeypatch.setattr(transfer_module, "RANGE_BYTES", 100_001)
    monkeypatch.setattr(transfer_module, "BLOCK_BYTES", 30_000)
    files = model_files(1_000_000)
    hub.add_repo("org/name", files)
    hub.fail(**fault)
    assert contents(fetch(SPEC, cache_dir)) == {name: files[name] for name in NEEDED}


def test_a_stalled_connection_is_left_for_another(
    hub: HubServer, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    files = model_files(3_000_000)
    hub.add_repo("org/name", files)
    released = threading.Event()
    hub.fail("/storage/", pause=lambda: released.wait(60), pause_after=2_000_000)
    try:
        assert (fetch(SPEC, cache_dir) / "model.safetensors").read_bytes() == files["model.safetensors"]
    finally:
        released.set()
    _, second = (r for r in hub.requests if "/storage/" in r.path)
    # What came before the stall is kept, but for the block that was coming.
    assert second.sent <= 1_000_000 + transfer_module.BLOCK_BYTES


def test_a_branch_that_moves_meanwhile_never_mixes_with_what_it_was(hub: HubServer, cache_dir: Path) -> None:
    files, later = model_files(3_000_000, shards=2), model_files(3_000_000, shards=2, seed=1)
    hub.add_repo("org/name", files)

    def on_progress(progress: FetchProgress) -> None:
        if progress.directory:
            hub.add_repo("org/name", later)

    fetched = contents(fetch(SPEC, cache_dir, on_progress))
    assert fetched == {name: files[name] for name in fetched}
    fetched = contents(fetch(SPEC, cache_dir))
    assert fetched == {name: later[name] for name in fetched}


def test_connections_are_kept_open_between_ranges(
    hub: HubServer, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_module, "RANGE_BYTES", 20_000)
    hub.add_repo("org/name", model_files(2_000_000))
    fetch(SPEC, cache_dir)
    reads = [request for request in hub.requests if "/storage/" in request.path]
    assert len(reads) == 100
    assert len({request.client for request in reads}) <= 16


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
def test_everything_goes_through_the_proxy_that_the_environment_names(
    hub: HubServer, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    # The stand-in answers requests for any host, as a proxy does.
    files = model_files()
    hub.add_repo("org/name", files)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv(variable, f"http://me:p%40ss@127.0.0.1:{hub.port}")
    monkeypatch.setenv("no_proxy", "")
    close_session()
    try:
        fetched = contents(fetch(SPEC, cache_dir))
    finally:
        close_session()
    assert fetched == {name: files[name] for name in NEEDED}
    # me:p@ss
    assert {request.proxy_authorization for request in hub.requests} == {"Basic bWU6cEBzcw=="}


def test_a_cut_connection_continues_where_it_was_cut(hub: HubServer, cache_dir: Path) -> None:
    hub.add_repo("org/name", model_files(3_000_000))
    hub.fail("/storage/", cut_after=2_000_000)
    fetch(SPEC, cache_dir)
    ranges = [r.range for r in hub.requests if "/storage/" in r.path]
    assert ranges == ["bytes=0-2999999", "bytes=2000000-2999999"]


def test_a_server_without_ranges_is_read_once_from_the_start(
    hub: HubServer, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_module, "RANGE_BYTES", 200_000)
    files = model_files(10_000_000)
    hub.add_repo("org/name", files)
    hub.fail("/storage/", ignore_range=True, times=1000)
    assert (fetch(SPEC, cache_dir) / "model.safetensors").read_bytes() == files["model.safetensors"]
    # Each of the 16 connections may get a stretch of it before it knows; 50 whole files would be 500 MB.
    assert hub.body_bytes("/storage/") < 100_000_000


def test_a_server_that_asks_to_wait_is_waited_for(
    hub: HubServer, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    original = transfer_module.retry.delay_s

    def recorded(tries: int, retry_after: float | None) -> float:
        waits.append(original(tries, retry_after))
        return 0.0

    monkeypatch.setattr(transfer_module.retry, "delay_s", recorded)
    hub.add_repo("org/name", model_files())
    hub.fail("/resolve/", status=429, headers={"Retry-After": "7"})
    fetch(SPEC, cache_dir)
    assert waits == [7.0]


# ---- faults that stay --------------------------------------------------------------------------


def test_wrong_bytes_are_never_published(hub: HubServer, cache_dir: Path) -> None:
    hub.add_repo("org/name", model_files())
    hub.fail("/storage/", corrupt=True, times=100)
    error = _fails(cache_dir)
    assert error.kind == "verification"
    assert "model.safetensors" in str(error)
    assert locate(SPEC, cache_dir) is None
    outside_partial = [p for p in cache_dir.rglob("model.safetensors") if p.parent.suffix != ".partial"]
    assert outside_partial == []


def test_a_hub_that_keeps_failing_is_a_network_error_and_nothing_is_lost(
    hub: HubServer, cache_dir: Path
) -> None:
    files = model_files(3_000_000)
    hub.add_repo("org/name", files)
    hub.fail("/storage/", cut_after=1_000_000)
    hub.fail("/storage/", status=500, times=50)
    error = _fails(cache_dir)
    assert error.kind == "network"
    assert "continues where it stopped" in str(error)
    hub.mend()
    hub.requests.clear()
    assert (fetch(SPEC, cache_dir) / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert [r.range for r in hub.requests if "/storage/" in r.path] == ["bytes=1000000-2999999"]
    assert hub.body_bytes("/resolve/") == 0


@pytest.mark.parametrize(
    ("lie", "kind"), [("elsewhere", "network"), ("unlabelled", "network"), ("size", "verification")]
)
def test_a_server_that_keeps_lying_about_ranges_is_given_up_on(
    hub: HubServer, cache_dir: Path, lie: str, kind: str
) -> None:
    hub.add_repo("org/name", model_files())
    hub.fail("/storage/", lie=lie, times=1000)
    assert _fails(cache_dir).kind == kind
    assert locate(SPEC, cache_dir) is None
    assert len([r for r in hub.requests if "/storage/" in r.path]) < 20
