"""Shared by the tests of the sources: stand-in servers, and an environment cut off from the user's own."""

from __future__ import annotations

import functools
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.awsrequest import AWSRequest
from botocore.httpsession import URLLib3Session
from moto.server import ThreadedMotoServer

from runtime.weights.sources import retry
from runtime.weights.sources import transfer as transfer_module
from tests.runtime.sources.hub_server import HubServer
from tests.runtime.sources.s3_server import Door, OpenDoor


@pytest.fixture(autouse=True)
def _own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    # Waiting between tries is not what is tested.
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.001)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub stand-in, and the environment pointing to it."""
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    """An empty cache."""
    return tmp_path / "cache"


# ---- S3 ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of moto's S3 server."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A client of the server, with a fresh bucket `models`; the environment points to it."""
    for name, value in {
        "AWS_ENDPOINT_URL_S3": s3_server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(transfer_module, "RANGE_BYTES", 100_000)
    client = _client(s3_server)
    reset = urllib.request.Request(f"{s3_server}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset).close()
    client.create_bucket(Bucket="models")
    return client


@functools.cache
def _client(server: str) -> Any:
    return boto3.client("s3", endpoint_url=server)


@pytest.fixture
def door(s3: Any, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenDoor]:
    """`door(fault, times)` puts a faulty door before the server."""
    doors = []

    def opened(fault: str, times: int, **options: int) -> Door:
        doors.append(Door(s3_server, fault, times, **options))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", doors[-1].url)
        return doors[-1]

    yield opened
    for each in doors:
        each.close()


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
