"""`firstlight serve` with a model that is not here yet: what clients see, and kills at any moment."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from tests.handler.serving import ROOT, Served, served, until
from tests.runtime.sources.hub_server import HubServer
from tests.runtime.sources.test_arrival import MAX_TOKENS, PROMPT, Held, answer

__all__ = ["answer"]  # a fixture

MODEL = "hf://org/name"
ASKED = {
    "prompt": PROMPT,
    "max_tokens": MAX_TOKENS,
    "temperature": 0,
    "ignore_eos": True,
    "logprobs": 0,
    "return_tokens_as_token_ids": True,
}
SHARDS = 8
PADDING = 100_000  # elements


def flags(*others: str) -> tuple[str, ...]:
    return "--model", MODEL, "--device", "cpu", "--kv-cache-memory-bytes", "8M", *others


def tokens_of(server: Served) -> list[int]:
    """What the server answers to the prompt, as ids."""
    connection = server.post("/v1/completions", **ASKED)
    reply = json.loads(connection.getresponse().read())
    connection.close()
    assert "choices" in reply, reply
    return [int(token.removeprefix("token_id:")) for token in reply["choices"][0]["logprobs"]["tokens"]]


@pytest.fixture(scope="session")
def sharded_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in several files, each with some more bytes that no layer asks for."""
    directory = tmp_path_factory.mktemp("sharded") / "llama"
    shutil.copytree(tiny_model, directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    places = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        held = {key: tensors[key] for key in list(tensors)[shard::SHARDS]}
        held[f"padding.{shard}"] = np.full(PADDING, shard, np.float32)
        save_file(held, directory / name, {"format": "pt"})
        places |= dict.fromkeys(held, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return directory


def test_who_waits_is_told_how_far_the_download_is(
    hub: HubServer, tiny_model: Path, cache_dir: Path, answer: list[int]
) -> None:
    hub.add_repo("org/name", tiny_model)
    held = Held(30_000)
    hub.fail("/storage/", **held.fault())
    with served(*flags("--download-dir", str(cache_dir))) as server:
        total = until(lambda: server.get("/status").get("progress", {"bytes_total": 0})["bytes_total"])
        progress = until(lambda: (told := server.get("/status")["progress"])["bytes_done"] and told)
        assert progress["phase"] == "download"
        assert 0 < progress["bytes_done"] < total == progress["bytes_total"]
        connection = server.post("/v1/completions", **ASKED, stream=True)
        response = connection.getresponse()
        assert re.fullmatch(rb": downloading \d+%\n", response.readline())
        held.release()
        events = [line for line in response if line.startswith(b"data: ")]
        assert events[-1] == b"data: [DONE]\n"
        assert "error" not in json.loads(events[0].removeprefix(b"data: "))
        connection.close()
        assert tokens_of(server) == answer


def test_a_terminal_shows_a_bar(hub: HubServer, tiny_model: Path, cache_dir: Path) -> None:
    hub.add_repo("org/name", tiny_model)
    held = Held(60_000)
    hub.fail("/storage/", **held.fault())
    ours, theirs = os.openpty()
    command = [
        sys.executable,
        "-m",
        "handler",
        "serve",
        *flags("--port", "0", "--download-dir", str(cache_dir)),
    ]
    server = subprocess.Popen(command, cwd=ROOT, stderr=theirs)
    os.close(theirs)
    shown = b""
    while not re.search(rb"firstlight: \[#+\.+\] +\d\d% of \d+ kB", shown):
        shown += os.read(ours, 1000)  # the end, should it come first, is an OSError
    held.release()
    while b"ready after" not in shown:
        shown += os.read(ours, 1000)
    server.terminate()
    assert server.wait(20) == 0
    os.close(ours)


def test_killed_at_random_moments_it_starts_and_brings_only_what_is_missing(
    hub: HubServer, sharded_model: Path, cache_dir: Path, answer: list[int]
) -> None:
    hub.add_repo("org/name", sharded_model)
    hub.fail("/storage/", pause=lambda: time.sleep(random.uniform(0, 1)), pause_after=150_000, times=1000)
    moments = random.Random(20)
    for _ in range(3):
        server = Served(*flags("--download-dir", str(cache_dir)))
        assert server.url
        time.sleep(moments.uniform(0.2, 2.0))
        started = psutil.Process(server.process.pid).children(recursive=True)
        server.process.send_signal(signal.SIGKILL)
        server.wait()
        psutil.wait_procs(started, 20)
        assert not any(process.is_running() for process in started), "an orphan goes on"
    hub.mend()
    verified = {path.name for path in cache_dir.rglob("*.safetensors") if path.parent.suffix != ".partial"}
    hub.requests.clear()
    with served(*flags("--download-dir", str(cache_dir))) as server:
        assert tokens_of(server) == answer
    asked = {request.path.rpartition("/")[2] for request in hub.requests if "/storage/" in request.path}
    assert asked.isdisjoint(verified)
    assert len(verified | asked) == SHARDS


@pytest.fixture
def nothing_in_memory() -> Iterator[Any]:
    """Lists the folders that servers without a cache have left; there must be none in the end."""

    def left() -> set[Path]:
        return set(Path("/dev/shm").glob("firstlight-*"))

    before = left()
    yield lambda: left() - before
    assert left() - before == set()


def test_without_a_cache_nothing_is_kept(
    hub: HubServer,
    tiny_model: Path,
    tmp_path: Path,
    answer: list[int],
    monkeypatch: pytest.MonkeyPatch,
    nothing_in_memory: Any,
) -> None:
    hub.add_repo("org/name", tiny_model)
    home = tmp_path / "home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    with served(*flags("--no-cache")) as server:
        assert tokens_of(server) == answer
        assert len(nothing_in_memory()) == 1
        server.process.send_signal(signal.SIGKILL)
        server.wait()
    assert len(nothing_in_memory()) == 1
    with served(*flags("--no-cache")) as server:
        assert tokens_of(server) == answer
        assert len(nothing_in_memory()) == 1, "what the killed one left is still there"
    assert not list(home.rglob("*.safetensors"))


def test_a_cache_that_cannot_be_written_is_an_error_that_names_the_flags(
    hub: HubServer, tiny_model: Path, tmp_path: Path
) -> None:
    hub.add_repo("org/name", tiny_model)
    (tmp_path / "models").write_text("a file")
    with served(*flags("--download-dir", str(tmp_path))) as server:
        connection = server.post("/v1/completions", **ASKED)
        response = connection.getresponse()
        message = json.loads(response.read())["error"]["message"]
        assert response.status == 503
        assert f"{tmp_path}/models" in message
        assert "--download-dir" in message
        assert "--no-cache" in message
        connection.close()
