"""S3, through boto3, against moto's server: versions, conditions, paging, refusals."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSRequest

from runtime.weights.sources import FetchProgress, SourceError, fetch, locate
from tests.runtime.sources.models import NEEDED, contents, model_files, spec
from tests.runtime.sources.s3_server import needed_files, upload


@pytest.mark.parametrize("source", ["s3://models/org/name", "s3://models/org/name/"])
def test_only_what_a_model_needs_is_fetched(s3: Any, cache_dir: Path, source: str) -> None:
    files = model_files(1_000_000)
    upload(s3, files)
    upload(s3, {"config.json": b"another model"}, prefix="org/name-other/")
    directory = fetch(spec(source), cache_dir)
    assert contents(directory) == {name: files[name] for name in NEEDED}
    assert directory.parent.parent == cache_dir / "models"
    assert directory.parent.name.startswith("s3--models--name-")


def test_a_bucket_may_be_one_model(s3: Any, cache_dir: Path) -> None:
    files = needed_files(10_000)
    upload(s3, files, prefix="")
    assert contents(fetch(spec("s3://models"), cache_dir)) == files


def test_a_warm_start_makes_no_request(s3: Any, cache_dir: Path, requests: list[AWSRequest]) -> None:
    upload(s3, needed_files())
    model = spec("s3://models/org/name")
    assert locate(model, cache_dir) is None
    directory = fetch(model, cache_dir)
    requests.clear()
    assert locate(model, cache_dir) == directory
    assert not requests


def test_fetching_again_lists_but_reads_nothing_that_is_here(
    s3: Any, cache_dir: Path, requests: list[AWSRequest]
) -> None:
    upload(s3, needed_files())
    model = spec("s3://models/org/name")
    directory = fetch(model, cache_dir)
    requests.clear()
    assert fetch(model, cache_dir) == directory
    assert all("list-type=2" in request.url for request in requests)


def test_a_new_upload_is_found_by_the_next_fetch(s3: Any, cache_dir: Path) -> None:
    model = spec("s3://models/org/name")
    upload(s3, needed_files())
    old = fetch(model, cache_dir)
    new_files = needed_files(seed=1)
    upload(s3, new_files)
    assert locate(model, cache_dir) == old
    new = fetch(model, cache_dir)
    assert locate(model, cache_dir) == new != old
    assert contents(new)["model.safetensors"] == new_files["model.safetensors"]


def test_listings_of_more_than_one_page(
    s3: Any, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, requests: list[AWSRequest]
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    files = needed_files(10_000)
    upload(s3, files)
    assert contents(fetch(spec("s3://models/org/name"), cache_dir)) == files
    assert any("continuation-token" in request.url for request in requests)


def test_a_source_that_never_holds_still_is_given_up_on(s3: Any, cache_dir: Path) -> None:
    upload(s3, needed_files())
    seen: set[Path] = set()

    def on_progress(progress: FetchProgress) -> None:
        if progress.directory and progress.directory not in seen:
            seen.add(progress.directory)
            upload(s3, {"model.safetensors": needed_files(seed=len(seen))["model.safetensors"]})

    with pytest.raises(SourceError, match="replaced while") as caught:
        fetch(spec("s3://models/org/name"), cache_dir, on_progress)
    assert caught.value.kind == "verification"
    assert locate(spec("s3://models/org/name"), cache_dir) is None


def test_one_version_of_one_object(s3: Any, cache_dir: Path) -> None:
    s3.put_bucket_versioning(Bucket="models", VersioningConfiguration={"Status": "Enabled"})
    old = needed_files()
    upload(s3, old)
    version = s3.head_object(Bucket="models", Key="org/name/model.safetensors")["VersionId"]
    s3.put_object(Bucket="models", Key="org/name/model.safetensors", Body=b"newer")
    url = "s3://models/org/name/model.safetensors"
    pinned = fetch(spec(f"{url}?versionId={version}"), cache_dir)
    assert contents(pinned) == old
    newest = fetch(spec(url), cache_dir)
    assert contents(newest)["model.safetensors"] == b"newer"


def test_keys_that_only_look_like_the_prefix_stay_out(s3: Any, cache_dir: Path) -> None:
    files = needed_files(1000)
    upload(s3, files)
    upload(s3, {"../config.json": b"outside", "sub/../../config.json": b"outside"})
    directory = fetch(spec("s3://models/org/name"), cache_dir)
    assert contents(directory) == files


# ---- who asks ----------------------------------------------------------------------------------


def test_requests_are_signed_and_addressed_path_style(
    s3: Any, cache_dir: Path, requests: list[AWSRequest], s3_server: str
) -> None:
    upload(s3, needed_files(1000))
    requests.clear()
    fetch(spec("s3://models/org/name"), cache_dir)
    assert requests
    assert all(request.url.startswith(f"{s3_server}/models") for request in requests)
    assert all("Authorization" in request.headers for request in requests)


@pytest.mark.parametrize("how", ["asked for", "no credentials"])
def test_anonymous_requests_read_what_is_public(
    s3: Any, cache_dir: Path, requests: list[AWSRequest], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    upload(s3, needed_files(1000), ACL="public-read")
    upload(s3, needed_files(1000), prefix="private/")
    requests.clear()
    if how == "asked for":
        monkeypatch.setenv("FIRSTLIGHT_S3_ANONYMOUS", "1")
    else:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert set(contents(fetch(spec("s3://models/org/name"), cache_dir))) == NEEDED
    with pytest.raises(SourceError, match="s3:GetObject") as caught:
        fetch(spec("s3://models/private"), cache_dir)
    assert caught.value.kind == "gated"
    assert not any("Authorization" in request.headers for request in requests)


def test_requester_pays_on_every_request(
    s3: Any, cache_dir: Path, requests: list[AWSRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(s3, needed_files(1000))
    monkeypatch.setenv("FIRSTLIGHT_S3_REQUEST_PAYER", "requester")
    requests.clear()
    fetch(spec("s3://models/org/name/model.safetensors"), cache_dir)
    payers = {request.headers.get("x-amz-request-payer") for request in requests}
    assert {p.decode() if isinstance(p, bytes) else p for p in payers} == {"requester"}


# ---- what can go wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "kind", "says"),
    [
        ("s3://nonesuch/org/name", "not_found", "NoSuchBucket"),
        ("s3://models/nonesuch", "not_found", "Nothing lies under"),
        ("s3://models/org/name/nonesuch.safetensors", "not_found", "nonesuch.safetensors"),
        ("s3://models/org/name/model.safetensors?versionId=0000", "revision", "no such version"),
        ("s3://models/org/name?versionId=0000", "invalid", "one object"),
        ("s3://models/org", "not_found", "Nothing lies under"),
    ],
)
def test_what_is_missing_is_said_to_be(s3: Any, cache_dir: Path, source: str, kind: str, says: str) -> None:
    s3.put_bucket_versioning(Bucket="models", VersioningConfiguration={"Status": "Enabled"})
    upload(s3, needed_files(1000))
    with pytest.raises(SourceError) as caught:
        fetch(spec(source), cache_dir)
    assert (caught.value.kind, says in str(caught.value)) == (kind, True), str(caught.value)
    assert locate(spec(source), cache_dir) is None


def test_no_network(s3: Any, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{bound.getsockname()[1]}")
        with pytest.raises(SourceError, match="AWS_ENDPOINT_URL_S3") as caught:
            fetch(spec("s3://models/org/name"), cache_dir)
    assert caught.value.kind == "network"
