"""Answers that begin before the digests of a download are known: none ends before, and a wrong one never."""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.handler.serving import Served, served, until
from tests.runtime.sources.hub_server import HubServer
from tests.runtime.sources.test_arrival import MAX_TOKENS, WEIGHTS, answer
from tests.runtime.sources.test_cold_servers import ASKED, flags, tokens_of

__all__ = ["answer"]  # a fixture

REST = "rest.safetensors"
# Of the rest, so much comes at once, the header in it.
EARLY_BYTES = 200_000


@pytest.fixture(scope="session")
def padded_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a second file, whose tensor no layer asks for."""
    directory = tmp_path_factory.mktemp("padded") / "llama"
    shutil.copytree(tiny_model, directory)
    places = dict.fromkeys(load_file(directory / WEIGHTS), WEIGHTS)
    save_file({"rest": np.zeros(EARLY_BYTES, np.float32)}, directory / REST, {"format": "pt"})
    index = {"weight_map": places | {"rest": REST}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


class LateEnd:
    """A Hub from which all comes but the end of REST, until `release`; some of it is wrong if `corrupt`.

    So the model can be computed with, while nobody knows whether all its files are what they should be.
    """

    def __init__(self, hub: HubServer, model: Path, *, corrupt: bool = False) -> None:
        self._released = threading.Event()
        commit = hub.add_repo("org/name", model)
        fault = {"pause_after": EARLY_BYTES, "drips_until": self._released}
        hub.fail(f"/storage/org/name/{commit}/{REST}", **fault, corrupt=corrupt, corrupt_at=EARLY_BYTES // 2)

    def release(self) -> None:
        self._released.set()


class Streamed:
    """A streamed answer, read in a thread."""

    def __init__(self, server: Served) -> None:
        self.events: list[dict[str, Any]] = []
        self._connection = server.post("/v1/completions", **ASKED, stream=True)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        for line in self._connection.getresponse():
            if line.startswith(b"data: {"):
                self.events.append(json.loads(line.removeprefix(b"data: ")))
        self._connection.close()

    @property
    def tokens(self) -> list[int]:
        choices = [choice for event in self.events for choice in event.get("choices", ())]
        tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
        return [int(token.removeprefix("token_id:")) for token in tokens]

    @property
    def finish_reasons(self) -> list[str]:
        choices = [choice for event in self.events for choice in event.get("choices", ())]
        return [choice["finish_reason"] for choice in choices if choice["finish_reason"]]

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join(60)
        assert self.ended


class Whole:
    """A whole answer, awaited in a thread: its status and body."""

    def __init__(self, server: Served, **asked: Any) -> None:
        self.status = 0
        self.body: dict[str, Any] = {}
        self._connection = server.post("/v1/completions", **(ASKED | asked))
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        response = self._connection.getresponse()
        self.body = json.loads(response.read())
        self.status = response.status
        self._connection.close()

    def wait(self) -> None:
        self._thread.join(60)
        assert self.status


def test_answers_begin_before_the_digests_are_known_and_end_after(
    hub: HubServer, padded_model: Path, cache_dir: Path, answer: list[int]
) -> None:
    late = LateEnd(hub, padded_model)
    with served(*flags("--download-dir", str(cache_dir))) as server:
        stream, whole, stopped = Streamed(server), Whole(server), Whole(server, stop=[" "], min_tokens=0)
        until(lambda: len(stream.tokens) >= MAX_TOKENS - 1)
        until(lambda: server.get("/status")["engine"]["running"] == 0)
        assert "verified" not in server.get("/status")["marks"]
        assert not stream.finish_reasons
        assert not stream.ended
        assert not whole.status
        assert not stopped.status
        late.release()
        for each in (stream, whole, stopped):
            each.wait()
        assert stream.tokens == answer
        assert stream.finish_reasons == ["length"]
        assert whole.status == stopped.status == 200
        marks = server.get("/status")["marks"]
        assert marks["verified"] > marks["first_token"]
        assert until(lambda: re.search(r'"event": "start".*"verified"', server.log))
        assert server.get("/status")["restarts"] == 0


def test_what_began_on_wrong_weights_ends_with_an_error_and_the_next_start_is_right(
    hub: HubServer, padded_model: Path, cache_dir: Path, answer: list[int]
) -> None:
    late = LateEnd(hub, padded_model, corrupt=True)
    with served(*flags("--download-dir", str(cache_dir))) as server:
        stream, whole = Streamed(server), Whole(server)
        until(lambda: len(stream.tokens) >= MAX_TOKENS - 1)
        late.release()
        stream.wait()
        whole.wait()
        expected = f"{REST} arrived with another content than the source's own digest promises"
        assert not stream.finish_reasons
        assert expected in stream.events[-1]["error"]["message"]
        assert whole.status == 503
        assert expected in whole.body["error"]["message"]
        assert tokens_of(server) == answer
        assert server.get("/status")["restarts"] == 1


def test_a_server_that_is_stopped_meanwhile_ends_what_it_has_begun(
    hub: HubServer, padded_model: Path, cache_dir: Path, answer: list[int]
) -> None:
    late = LateEnd(hub, padded_model)
    with served(*flags("--download-dir", str(cache_dir))) as server:
        stream = Streamed(server)
        until(lambda: len(stream.tokens) >= MAX_TOKENS - 1)
        server.process.send_signal(signal.SIGTERM)
        threading.Timer(0.5, late.release).start()
        stream.wait()
        assert stream.tokens == answer
        assert stream.finish_reasons == ["length"]
        assert server.wait() == 0
    hub.requests.clear()
    with served(*flags("--download-dir", str(cache_dir))) as server:
        assert tokens_of(server) == answer
    assert hub.body_bytes("/storage/") == 0
