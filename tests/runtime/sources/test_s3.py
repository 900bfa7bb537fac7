"""S3, through boto3, against moto's server: versions, conditions, paging, faults."""

from __future__ import annotations

import functools
import http.client
import socket
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.awsrequest import AWSRequest
from botocore.httpsession import URLLib3Session
from moto.server import ThreadedMotoServer

from runtime.weights.sources import FetchProgress, SourceError, fetch, locate
from runtime.weights.sources import transfer as transfer_module
from tests.runtime.sources.conftest import NEEDED, contents, model_files, spec


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A client of the server, with a fresh bucket `models`; the environment points to it."""
    for name, value in {
        "AWS_ENDPOINT_URL_S3": server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setattr(transfer_module, "RANGE_BYTES", 100_000)
    client = _client(server)
    reset = urllib.request.Request(f"{server}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset).close()
    client.create_bucket(Bucket="models")
    return client


@functools.cache
def _client(server: str) -> Any:
    return boto3.client("s3", endpoint_url=server)


def _upload(s3: Any, files: dict[str, bytes], prefix: str = "org/name/", **options: str) -> None:
    for name, content in files.items():
        s3.put_object(Bucket="models", Key=prefix + name, Body=content, **options)


def needed_files(weight_bytes: int = 100_000, seed: int = 0) -> dict[str, bytes]:
    """Those of `model_files` that are fetched."""
    files = model_files(weight_bytes, seed=seed)
    return {name: files[name] for name in NEEDED}


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[AWSRequest]:
    """Every request that boto3 sends, as it goes on the wire."""
    sent: list[AWSRequest] = []
    genuine = URLLib3Session.send

    def recorded(self: URLLib3Session, request: AWSRequest) -> Any:
        sent.append(request)
        return genuine(self, request)

    monkeypatch.setattr(URLLib3Session, "send", recorded)
    return sent


@pytest.mark.parametrize("source", ["s3://models/org/name", "s3://models/org/name/"])
def test_only_what_a_model_needs_is_fetched(s3: Any, cache_dir: Path, source: str) -> None:
    files = model_files(1_000_000)
    _upload(s3, files)
    _upload(s3, {"config.json": b"another model"}, prefix="org/name-other/")
    directory = fetch(spec(source), cache_dir)
    assert contents(directory) == {name: files[name] for name in NEEDED}
    assert directory.parent.parent == cache_dir / "models"
    assert directory.parent.name.startswith("s3--models--name-")


def test_a_bucket_may_be_one_model(s3: Any, cache_dir: Path) -> None:
    files = needed_files(10_000)
    _upload(s3, files, prefix="")
    assert contents(fetch(spec("s3://models"), cache_dir)) == files


def test_a_warm_start_makes_no_request(s3: Any, cache_dir: Path, requests: list[AWSRequest]) -> None:
    _upload(s3, needed_files())
    model = spec("s3://models/org/name")
    assert locate(model, cache_dir) is None
    directory = fetch(model, cache_dir)
    requests.clear()
    assert locate(model, cache_dir) == directory
    assert not requests


def test_fetching_again_lists_but_reads_nothing_that_is_here(
    s3: Any, cache_dir: Path, requests: list[AWSRequest]
) -> None:
    _upload(s3, needed_files())
    model = spec("s3://models/org/name")
    directory = fetch(model, cache_dir)
    requests.clear()
    assert fetch(model, cache_dir) == directory
    assert all("list-type=2" in request.url for request in requests)


def test_a_new_upload_is_found_by_the_next_fetch(s3: Any, cache_dir: Path) -> None:
    model = spec("s3://models/org/name")
    _upload(s3, needed_files())
    old = fetch(model, cache_dir)
    new_files = needed_files(seed=1)
    _upload(s3, new_files)
    assert locate(model, cache_dir) == old
    new = fetch(model, cache_dir)
    assert locate(model, cache_dir) == new != old
    assert contents(new)["model.safetensors"] == new_files["model.safetensors"]


def test_listings_of_more_than_one_page(
    s3: Any, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, requests: list[AWSRequest]
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    files = needed_files(10_000)
    _upload(s3, files)
    assert contents(fetch(spec("s3://models/org/name"), cache_dir)) == files
    assert any("continuation-token" in request.url for request in requests)


def test_an_object_replaced_meanwhile_never_mixes_with_the_old_one(s3: Any, cache_dir: Path) -> None:
    s3.put_bucket_versioning(Bucket="models", VersioningConfiguration={"Status": "Enabled"})
    _upload(s3, needed_files(3_000_000))
    new_files = needed_files(3_000_000, seed=1)
    replaced = threading.Event()

    def on_progress(progress: FetchProgress) -> None:
        if progress.directory and not replaced.is_set():
            replaced.set()
            _upload(s3, new_files)

    directory = fetch(spec("s3://models/org/name"), cache_dir, on_progress)
    assert replaced.is_set()
    assert contents(directory) == new_files
    # Nothing of the version that vanished is left.
    assert {p.name for p in directory.parent.iterdir() if p.is_dir()} == {directory.name, "refs"}


def test_a_source_that_never_holds_still_is_given_up_on(s3: Any, cache_dir: Path) -> None:
    _upload(s3, needed_files())
    seen: set[Path] = set()

    def on_progress(progress: FetchProgress) -> None:
        if progress.directory and progress.directory not in seen:
            seen.add(progress.directory)
            _upload(s3, {"model.safetensors": needed_files(seed=len(seen))["model.safetensors"]})

    with pytest.raises(SourceError, match="replaced while") as caught:
        fetch(spec("s3://models/org/name"), cache_dir, on_progress)
    assert caught.value.kind == "verification"
    assert locate(spec("s3://models/org/name"), cache_dir) is None


def test_one_version_of_one_object(s3: Any, cache_dir: Path) -> None:
    s3.put_bucket_versioning(Bucket="models", VersioningConfiguration={"Status": "Enabled"})
    old = needed_files()
    _upload(s3, old)
    version = s3.head_object(Bucket="models", Key="org/name/model.safetensors")["VersionId"]
    s3.put_object(Bucket="models", Key="org/name/model.safetensors", Body=b"newer")
    url = "s3://models/org/name/model.safetensors"
    pinned = fetch(spec(f"{url}?versionId={version}"), cache_dir)
    assert contents(pinned) == old
    newest = fetch(spec(url), cache_dir)
    assert contents(newest)["model.safetensors"] == b"newer"


def test_keys_that_only_look_like_the_prefix_stay_out(s3: Any, cache_dir: Path) -> None:
    files = needed_files(1000)
    _upload(s3, files)
    _upload(s3, {"../config.json": b"outside", "sub/../../config.json": b"outside"})
    directory = fetch(spec("s3://models/org/name"), cache_dir)
    assert contents(directory) == files


# ---- who asks ----------------------------------------------------------------------------------


def test_requests_are_signed_and_addressed_path_style(
    s3: Any, cache_dir: Path, requests: list[AWSRequest], server: str
) -> None:
    _upload(s3, needed_files(1000))
    requests.clear()
    fetch(spec("s3://models/org/name"), cache_dir)
    assert requests
    assert all(request.url.startswith(f"{server}/models") for request in requests)
    assert all("Authorization" in request.headers for request in requests)


@pytest.mark.parametrize("how", ["asked for", "no credentials"])
def test_anonymous_requests_read_what_is_public(
    s3: Any, cache_dir: Path, requests: list[AWSRequest], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    _upload(s3, needed_files(1000), ACL="public-read")
    _upload(s3, needed_files(1000), prefix="private/")
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
    _upload(s3, needed_files(1000))
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
    _upload(s3, needed_files(1000))
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


class _Proxy(BaseHTTPRequestHandler):
    """A door before the S3 server that lets some requests go wrong."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    upstream: str
    fault: str
    left: int
    lock: threading.Lock

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        upstream = http.client.HTTPConnection(self.upstream)
        headers = dict(self.headers.items())
        fault = self._fault()
        if fault == "whole file":
            headers.pop("Range", None)
        upstream.request(self.command, self.path, headers=headers)
        answer = upstream.getresponse()
        body = answer.read()
        upstream.close()
        status = answer.status
        if fault == "slow down":
            status, body = 503, b"<Error><Code>SlowDown</Code></Error>"
        elif fault == "200 with a range":
            status = 200
        self.send_response(status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header(
            "Content-Length", answer.getheader("Content-Length") if self.command == "HEAD" else str(len(body))
        )
        self.end_headers()
        if fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif self.command == "GET":
            self.wfile.write(body)

    def _fault(self) -> str | None:
        with self.lock:
            if "model.safetensors" not in self.path or type(self).left == 0:
                return None
            type(self).left -= 1
            return self.fault


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch, s3: Any) -> Iterator[Any]:
    """`proxy(fault, times)` puts a faulty door before the server."""
    doors = []

    def opened(fault: str, times: int) -> None:
        attributes = {"upstream": server.removeprefix("http://"), "fault": fault, "left": times}
        handler = type("Door", (_Proxy,), {**attributes, "lock": threading.Lock()})
        door = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        door.daemon_threads = True
        threading.Thread(target=door.serve_forever, args=(0.05,), daemon=True).start()
        doors.append(door)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{door.server_address[1]}")

    yield opened
    for door in doors:
        door.shutdown()
        door.server_close()


@pytest.mark.parametrize(
    ("fault", "times"),
    [("cut", 5), ("slow down", 2), ("whole file", 1), ("whole file", 99), ("200 with a range", 99)],
)
def test_passing_faults_are_mended(s3: Any, cache_dir: Path, proxy: Any, fault: str, times: int) -> None:
    files = needed_files(1_000_000)
    _upload(s3, files)
    proxy(fault, times)
    assert contents(fetch(spec("s3://models/org/name"), cache_dir)) == files


def test_an_interrupted_fetch_continues(s3: Any, cache_dir: Path, requests: list[AWSRequest]) -> None:
    files = needed_files(1_000_000)
    _upload(s3, files)

    class Interrupted(Exception):
        pass

    def stop(progress: FetchProgress) -> None:
        if progress.bytes_done >= 500_000:
            raise Interrupted

    with pytest.raises(Interrupted):
        fetch(spec("s3://models/org/name"), cache_dir, stop)
    requests.clear()
    assert contents(fetch(spec("s3://models/org/name"), cache_dir)) == files
    read = [request for request in requests if "model.safetensors" in request.url]
    assert len(read) <= 5
    assert not any("config.json" in request.url for request in requests)
