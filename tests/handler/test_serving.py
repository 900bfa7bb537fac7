"""The whole server with a real engine: crashes, clients that leave, starts that fail, signals."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.handler.serving import Served, served, until

ENDLESS = {"prompt": "Once upon a time", "max_tokens": 100_000, "temperature": 0}
SHORT = ENDLESS | {"max_tokens": 12}


@pytest.fixture(scope="module")
def server(endless_model: Path) -> Iterator[Served]:
    with served("--model", str(endless_model), "--device", "cpu", "--kv-cache-memory-bytes", "32M") as server:
        yield server


def answer(connection: http.client.HTTPConnection) -> tuple[int, Any]:
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def begin_stream(server: Served, **fields: Any) -> tuple[http.client.HTTPConnection, Any]:
    """A stream of which the first piece has come."""
    connection = server.post("/v1/completions", **ENDLESS, stream=True, **fields)
    response = connection.getresponse()
    assert response.status == 200
    while not (line := response.readline()).startswith(b"data: "):
        assert line == b"\n" or line.startswith(b": "), line  # the model may still be loading
    return connection, response


class TestCrash:
    def test_everyone_is_told_and_the_next_request_works(self, server: Served) -> None:
        before = answer(server.post("/v1/completions", **SHORT))[1]["choices"][0]
        streams = [begin_stream(server) for _ in range(12)]
        whole = [server.post("/v1/completions", **ENDLESS) for _ in range(4)]
        until(lambda: server.get("/status")["engine"]["running"] == 16)
        server.engine.send_signal(signal.SIGKILL)
        for connection in whole:
            response = connection.getresponse()
            error = json.loads(response.read())["error"]
            assert (response.status, error["code"]) == (503, "engine_unavailable")
            assert int(response.headers["retry-after"]) >= 1
            connection.close()
        for connection, response in streams:
            *_, last, done = [line for line in response.read().split(b"\n") if line.startswith(b"data: ")]
            assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_unavailable"
            assert done == b"data: [DONE]"
            connection.close()
        assert answer(server.post("/v1/completions", **SHORT))[1]["choices"][0] == before
        status = server.get("/status")
        assert (status["state"], status["restarts"]) == ("warm", 1)
        assert status["queue"]["in_flight"] == 0


class TestLeaving:
    def test_whoever_leaves_frees_their_blocks(self, server: Served) -> None:
        chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 100_000}
        left = [begin_stream(server)[0], begin_stream(server, n=3)[0]]
        left += [server.post("/v1/completions", **ENDLESS), server.post("/v1/chat/completions", **chat)]
        engine = until(lambda: (s := server.get("/status")["engine"])["running"] == 6 and s)
        assert engine["blocks_used"] >= 6
        for connection in left:
            connection.sock.shutdown(socket.SHUT_RDWR)
        until(lambda: server.get("/status")["engine"]["running"] == 0)
        status = server.get("/status")
        assert (status["engine"]["blocks_used"], status["engine"]["waiting"]) == (0, 0)
        assert status["queue"] == {**status["queue"], "waiting": 0, "in_flight": 0}

    def test_whoever_leaves_while_waiting_is_not_waited_for(self, endless_model: Path) -> None:
        with served("--model", str(endless_model), "--device", "cpu", "--max-num-seqs", "1") as server:
            running, _ = begin_stream(server)
            kinds = ({"stream": True}, {"n": 3}, {})
            waiting = [server.post("/v1/completions", **ENDLESS, **fields) for fields in kinds]
            until(lambda: server.get("/status")["engine"]["waiting"] == 5)
            for connection in waiting:
                connection.sock.shutdown(socket.SHUT_RDWR)
            until(lambda: server.get("/status")["engine"]["waiting"] == 0)
            assert server.get("/status")["queue"]["in_flight"] == 1
            running.sock.shutdown(socket.SHUT_RDWR)
            assert answer(server.post("/v1/completions", **SHORT))[0] == 200


class TestEnd:
    def test_a_signal_lets_answers_finish(self, tiny_model: Path) -> None:
        with served("--model", str(tiny_model), "--device", "cpu") as server:
            body = {"prompt": "Once", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
            streamed = server.post("/v1/completions", **body, stream=True)
            assert streamed.getresponse().status == 200
            whole = server.post("/v1/completions", **body)
            until(lambda: server.get("/status")["queue"]["in_flight"] == 2)
            server.process.send_signal(signal.SIGTERM)
            status, finished = answer(whole)
            assert (status, finished["usage"]["completion_tokens"]) == (200, 400)
            assert server.wait() == 0
            assert '"event": "start"' in server.log

    def test_a_signal_while_it_loads(self, tiny_model: Path) -> None:
        with served("--model", str(tiny_model), "--device", "cpu") as server:
            assert server.get("/health/live") == {"status": "live"}
            server.process.send_signal(signal.SIGINT)
            assert server.wait() == 0
            assert "Traceback" not in server.log

    def test_an_engine_whose_handler_was_killed_ends_itself(self, tiny_model: Path) -> None:
        with served("--model", str(tiny_model), "--device", "cpu") as server:
            answer(server.post("/v1/completions", **SHORT))
            engine = server.engine
            server.process.kill()
            engine.wait(20)

    def test_a_model_that_cannot_be_loaded(self, tiny_model: Path, tmp_path: Path) -> None:
        broken = shutil.copytree(tiny_model, tmp_path / "broken")
        (broken / "model.safetensors").write_bytes(b"\x10" + bytes(30))
        with served("--model", str(broken), "--device", "cpu") as server:
            assert server.wait() == 1
            assert server.log.count("model.safetensors") == 1
            assert "Traceback" not in server.log
