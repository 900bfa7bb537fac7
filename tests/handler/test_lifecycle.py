"""Loading, ready, dying, leaving: what callers are told, and what the engine is told."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.handler.conftest import GREETING, Server, starter


@pytest.fixture
def loading(make_server: Callable[..., Server]) -> Server:
    return make_server(prepare=lambda engine: engine.set_loading(43, 100))


def never_ending(engine: Any) -> None:
    engine.endless = True


class TestHealth:
    def test_while_loading(self, loading: Server) -> None:
        assert loading.get("/health/live").status == 200
        for path in ("/health/ready", "/health/startup"):
            reply = loading.get(path)
            assert reply.status == 503
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.json["state"] == "loading"
            assert reply.json["progress"]["percent"] == 43

    def test_once_warm(self, server: Server) -> None:
        assert [server.get(f"/health/{name}").status for name in ("live", "ready", "startup")] == [200] * 3

    def test_a_failure_says_why(self, make_server: Callable[..., Server]) -> None:
        def fail(engine: Any) -> None:
            engine.state, engine.failure = "failed", "No such model."

        server = make_server(prepare=fail)
        assert server.get("/health/ready").status == 503
        assert server.get("/health/ready").json["error"] == "No such model."
        reply = server.chat()
        assert (reply.status, reply.error["message"]) == (503, "No such model.")
        assert "retry-after" in reply.headers

    def test_health_and_metrics_ask_nothing_of_the_engine(self, server: Server) -> None:
        for path in ("/health/live", "/health/ready", "/health/startup", "/status", "/metrics"):
            server.get(path)
        assert server.engine.submitted == []

    def test_status_shows_the_start(self, server: Server) -> None:
        status = server.get("/status").json
        assert status["state"] == "warm"
        assert status["marks"]["listen"] == 0.1
        assert status["memory"]["weight_bytes"] == 1234
        assert status["max_model_len"] == 512


class TestWhileLoading:
    def test_a_stream_is_held_and_told_so(self, loading: Server) -> None:
        with loading.open_stream() as sock, sock.makefile("rb") as lines:
            assert lines.readline().startswith(b"HTTP/1.1 200 ")
            assert any(line == b": loading 43%\n" for line in lines)
            loading.engine.become_ready()
            rest = lines.read1(1 << 20)
            while b"[DONE]" not in rest:
                rest += lines.read1(1 << 20)
        events = [json.loads(line[6:]) for line in rest.split(b"\n") if line.startswith(b"data: {")]
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == GREETING

    def test_a_whole_answer_is_held(self, loading: Server) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", loading.port, timeout=10)
        connection.request("POST", "/v1/completions", b'{"prompt": "x", "max_tokens": 5}')
        assert loading.engine.submit_seen.wait(10)
        loading.engine.become_ready()
        assert json.loads(connection.getresponse().read())["choices"][0]["text"] == "Hello"
        connection.close()

    def test_mistakes_are_told_at_once(self, loading: Server) -> None:
        assert loading.chat(stream=True, temperature=9).status == 400
        assert loading.complete("x" * 600, stream=True).error["code"] == "context_length_exceeded"


def test_an_answer_that_pauses_keeps_its_connection(
    make_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handler.openai.endpoint._PATIENCE_ANSWERING_SECONDS", 0.1)
    server = make_server(prepare=never_ending)
    with server.open_stream() as sock, sock.makefile("rb") as lines:
        assert any(b'"content":"' in line for line in lines)
        assert any(line == b": waiting\n" for line in lines)


class TestLeaving:
    def test_a_stream_that_is_left_is_aborted(self, make_server: Callable[..., Server]) -> None:
        server = make_server(prepare=never_ending)
        sock = server.open_stream()
        with sock, sock.makefile("rb") as lines:
            assert any(b'"content":"' in line for line in lines)
        assert server.engine.abort_seen.wait(10)
        assert server.engine.aborted == [server.engine.submitted[0].request_id]

    def test_every_choice_of_it(self, make_server: Callable[..., Server]) -> None:
        server = make_server(prepare=never_ending)
        sock = server.open_stream(n=3)
        with sock, sock.makefile("rb") as lines:
            assert any(b'"content":"' in line for line in lines)
        assert server.engine.abort_seen.wait(10)
        # The three are told within one turn of the event loop, so any later answer comes after them all.
        assert server.get("/status").json["queue"]["in_flight"] == 0
        assert len(server.engine.aborted) == 3

    @pytest.mark.parametrize("stream", [True, False])
    def test_while_it_still_waits_for_the_model(self, loading: Server, stream: bool) -> None:
        sock = loading.open_stream(stream=stream, n=2)
        assert loading.engine.submit_seen.wait(10)
        sock.close()
        assert loading.engine.abort_seen.wait(10)
        assert loading.get("/status").json["queue"] == {"waiting": 0, "limit": 1024, "in_flight": 0}
        assert len(loading.engine.aborted) == 2

    def test_a_whole_answer_that_is_left_is_aborted(self, make_server: Callable[..., Server]) -> None:
        server = make_server(prepare=never_ending)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("POST", "/v1/completions", b'{"prompt": "x", "n": 2, "max_tokens": 50}')
        assert server.engine.submit_seen.wait(10)
        connection.close()
        assert server.engine.abort_seen.wait(10)


class TestShuttingDown:
    """The servers of these tests give running answers one second to finish."""

    def test_the_engine_is_closed(self, tiny_model: Any) -> None:
        with starter(tiny_model) as make:
            server = make()
            assert server.chat().status == 200
        assert server.engine.closed.is_set()

    def test_a_stream_that_takes_too_long_is_told(self, make_server: Callable[..., Server]) -> None:
        server = make_server(prepare=never_ending)
        with server.open_stream() as sock, sock.makefile("rb") as lines:
            assert any(b'"content":"' in line for line in lines)
            server.stop()
            rest = lines.read().decode().replace("\r\n", "\n")
        *_, error, done, _ = [line for line in rest.split("\n") if line.startswith(("data:", "0"))]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert done == "data: [DONE]"

    def test_so_is_who_waits_for_a_whole_answer(self, make_server: Callable[..., Server]) -> None:
        server = make_server(prepare=never_ending)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("POST", "/v1/completions", b'{"prompt": "x", "max_tokens": 50}')
        assert server.engine.submit_seen.wait(10)
        server.stop()
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["error"]["code"]) == (503, "shutting_down")
        assert int(response.headers["retry-after"]) >= 1
        connection.close()

    def test_what_is_almost_done_is_finished(self, make_server: Callable[..., Server]) -> None:
        server = make_server(prepare=lambda engine: engine.set_loading())
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("POST", "/v1/completions", b'{"prompt": "x", "max_tokens": 5}')
        assert server.engine.submit_seen.wait(10)
        server.stop()
        server.engine.become_ready()
        response = connection.getresponse()
        assert json.loads(response.read())["choices"][0]["text"] == "Hello"
        connection.close()
