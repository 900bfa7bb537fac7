"""Shared by the tests of the sources: a model's files, and an environment cut off from the user's own."""

from __future__ import annotations

import functools
import json
import random
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.awsrequest import AWSRequest
from botocore.httpsession import URLLib3Session
from moto.server import ThreadedMotoServer

from runtime.catalogue import ModelSpec
from runtime.weights.sources import retry
from runtime.weights.sources import transfer as transfer_module
from tests.runtime.sources.hub_server import HubServer


def model_files(weight_bytes: int = 300_000, *, seed: int = 0, shards: int = 1) -> dict[str, bytes]:
    """A model's folder, with what a repository holds besides; the weights are random bytes."""
    rng = random.Random(seed)
    files = {
        "config.json": json.dumps({"model_type": "llama", "seed": seed}).encode(),
        "generation_config.json": b"{}",
        "tokenizer.json": b'{"model": {}}',
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "README.md": b"# A model",
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": b"the same once more",
        "original/params.json": b"{}",
        "onnx/model.onnx": b"onnx",
        "model-q4.gguf": b"GGUF",
    }
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    if shards == 1:
        names = ["model.safetensors"]
    else:
        weight_map = {f"layers.{i}.weight": name for i, name in enumerate(names)}
        files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    for name in names:
        files[name] = rng.randbytes(weight_bytes)
    return files


# What of `model_files` a runtime needs.
NEEDED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
}


def contents(directory: Path) -> dict[str, bytes]:
    """The visible files of a folder and what is in them."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if not path.name.startswith(".")}


def spec(source: str, revision: str | None = None) -> ModelSpec:
    """A catalogue entry of this source."""
    return ModelSpec(id="model", source=source, revision=revision)


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
def requests(monkeypatch: pytest.MonkeyPatch) -> list[AWSRequest]:
    """Every request that boto3 sends, as it goes on the wire."""
    sent: list[AWSRequest] = []
    genuine = URLLib3Session.send

    def recorded(self: URLLib3Session, request: AWSRequest) -> Any:
        sent.append(request)
        return genuine(self, request)

    monkeypatch.setattr(URLLib3Session, "send", recorded)
    return sent
