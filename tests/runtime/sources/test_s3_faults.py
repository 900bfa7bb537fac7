"""S3 when things go wrong on the way: cuts, resets, stalls, 503s, lies about ranges, replaced objects."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSRequest

from runtime.weights.sources import FetchProgress, SourceError, fetch, locate
from runtime.weights.sources import s3 as s3_module
from runtime.weights.sources import transfer as transfer_module
from tests.runtime.sources.models import contents, spec
from tests.runtime.sources.s3_server import OpenDoor, needed_files, upload

SPEC = spec("s3://models/org/name")


@pytest.mark.parametrize(
    ("fault", "times"),
    [
        ("cut", 5),
        ("reset", 5),
        ("slow down", 2),
        ("whole file", 1),
        ("whole file", 99),
        ("200 with a range", 99),
        ("elsewhere", 5),
        ("unlabelled", 5),
        ("longer", 99),
        ("shorter", 10),
    ],
)
def test_passing_faults_are_mended(s3: Any, cache_dir: Path, door: OpenDoor, fault: str, times: int) -> None:
    files = needed_files(1_000_000)
    upload(s3, files)
    door(fault, times)
    assert contents(fetch(SPEC, cache_dir)) == files


def test_a_stalled_connection_is_left_for_another(
    s3: Any, cache_dir: Path, door: OpenDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "_READ_TIMEOUT_S", 0.5)
    files = needed_files(1_000_000)
    upload(s3, files)
    door("stall", 3)
    assert contents(fetch(SPEC, cache_dir)) == files


def test_the_last_connection_is_not_waited_for_when_it_goes_silent(
    s3: Any, cache_dir: Path, door: OpenDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "_READ_TIMEOUT_S", 1000)
    monkeypatch.setattr(transfer_module, "SILENT_S", 0.5)
    files = needed_files(1_000_000)
    upload(s3, files)
    door("stall", 3)
    assert contents(fetch(SPEC, cache_dir)) == files


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("slow down", "network"), ("elsewhere", "network"), ("unlabelled", "network"), ("size", "verification")],
)
def test_a_server_that_keeps_failing_is_given_up_on(
    s3: Any, cache_dir: Path, door: OpenDoor, monkeypatch: pytest.MonkeyPatch, fault: str, kind: str
) -> None:
    # boto3 waits seconds between its own tries.
    monkeypatch.setattr(s3_module, "_MAX_ATTEMPTS", 1)
    upload(s3, needed_files())
    door(fault, 1000)
    with pytest.raises(SourceError) as caught:
        fetch(SPEC, cache_dir)
    assert caught.value.kind == kind
    assert locate(SPEC, cache_dir) is None


def _replaces(s3: Any, files: dict[str, bytes]) -> Callable[[FetchProgress], None]:
    """Replaces everything once, when the weights are about to come."""
    replaced = threading.Event()

    def on_progress(progress: FetchProgress) -> None:
        if progress.directory and not replaced.is_set():
            replaced.set()
            upload(s3, files)

    return on_progress


@pytest.mark.parametrize("conditions", [True, False], ids=["If-Match", "no If-Match"])
def test_an_object_replaced_meanwhile_never_mixes_with_the_old_one(
    s3: Any, cache_dir: Path, door: OpenDoor, conditions: bool
) -> None:
    if not conditions:
        door("no conditions", -1)
    upload(s3, needed_files(3_000_000))
    new_files = needed_files(3_000_000, seed=1)
    directory = fetch(SPEC, cache_dir, _replaces(s3, new_files))
    assert contents(directory) == new_files
    # Nothing of the version that vanished is left.
    assert {p.name for p in directory.parent.iterdir() if p.is_dir()} == {directory.name, "refs"}


def test_what_has_a_digest_is_held_to_it(s3: Any, cache_dir: Path, door: OpenDoor) -> None:
    files = needed_files(1_000_000)
    upload(s3, files, ChecksumAlgorithm="SHA256")
    door("corrupt", 3)
    assert contents(fetch(SPEC, cache_dir)) == files
    door("corrupt", 1000)
    upload(s3, needed_files(1_000_000, seed=1), ChecksumAlgorithm="SHA256")
    with pytest.raises(SourceError, match="another content than") as caught:
        fetch(SPEC, cache_dir)
    assert caught.value.kind == "verification"


def test_every_read_names_the_version_that_was_listed(
    s3: Any, cache_dir: Path, requests: list[AWSRequest]
) -> None:
    upload(s3, needed_files(1_000_000))
    etag = s3.head_object(Bucket="models", Key="org/name/model.safetensors")["ETag"]
    fetch(SPEC, cache_dir)
    reads = [r for r in requests if r.method == "GET" and r.url.endswith("/model.safetensors")]
    assert len(reads) == 10
    assert {_text(read.headers["If-Match"]) for read in reads} == {etag}


def _text(header: str | bytes) -> str:
    return header.decode() if isinstance(header, bytes) else header


def test_an_interrupted_fetch_continues(s3: Any, cache_dir: Path, requests: list[AWSRequest]) -> None:
    files = needed_files(1_000_000)
    upload(s3, files)

    class Interrupted(Exception):
        pass

    def stop(progress: FetchProgress) -> None:
        if progress.bytes_done >= 500_000:
            raise Interrupted

    with pytest.raises(Interrupted):
        fetch(SPEC, cache_dir, stop)
    requests.clear()
    assert contents(fetch(SPEC, cache_dir)) == files
    read = [request for request in requests if "model.safetensors" in request.url]
    assert len(read) <= 5
    assert not any("config.json" in request.url for request in requests)
