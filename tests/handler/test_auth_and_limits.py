"""Who may call, how large and how many calls may be, and what comes back otherwise."""

from __future__ import annotations

import gzip
import http.client
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.handler.conftest import Reply, Server, starter

PROTECTED = [
    ("GET", "/v1/models"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/status"),
    ("GET", "/metrics"),
    ("GET", "/nowhere"),
    ("GET", "/health/ready/"),
    ("GET", "//health/ready"),
]


@pytest.fixture(scope="module")
def locked(tiny_model: Path) -> Iterator[Server]:
    with starter(tiny_model) as make:
        yield make(api_keys=("first-key", "second-key"))


class TestKeys:
    @pytest.mark.parametrize(("method", "path"), PROTECTED)
    @pytest.mark.parametrize(
        "header",
        [None, "Bearer wrong", "Bearer ", "first-key", "Basic first-key", "Bearer first-keyy", "Bearer \xe9"],
    )
    def test_no_door_opens_without_one(
        self, locked: Server, method: str, path: str, header: str | None
    ) -> None:
        reply = locked.request(method, path, headers={"Authorization": header} if header else {})
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"

    @pytest.mark.parametrize("key", ["first-key", "second-key"])
    def test_each_key_opens(self, locked: Server, key: str) -> None:
        assert locked.get("/v1/models", {"Authorization": f"Bearer {key}"}).status == 200
        assert locked.get("/v1/models", {"Authorization": f"bearer {key}"}).status == 200

    @pytest.mark.parametrize("path", ["/", "/health/live", "/health/ready", "/health/startup"])
    def test_probes_and_the_page_need_none(self, locked: Server, path: str) -> None:
        assert locked.get(path).status != 401

    def test_a_host_header_does_not_move_the_path(self, locked: Server) -> None:
        assert locked.get("/v1/models", {"Host": "x/health/live?"}).status == 401


class TestRequestIds:
    def test_given_ids_come_back(self, server: Server) -> None:
        assert server.chat().headers["x-request-id"]
        assert server.get("/v1/models", {"X-Request-Id": "my-id.1"}).headers["x-request-id"] == "my-id.1"
        assert server.get("/nowhere", {"X-Request-Id": "my-id.2"}).headers["x-request-id"] == "my-id.2"

    def test_others_are_unique(self, server: Server) -> None:
        ids = {server.get("/health/live").headers["x-request-id"] for _ in range(5)}
        assert len(ids) == 5

    def test_odd_ids_are_not_echoed(self, server: Server) -> None:
        assert server.get("/health/live", {"X-Request-Id": "a b<c>"}).headers["x-request-id"] != "a b<c>"


class TestMediaTypes:
    @pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
    @pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
    def test_what_is_no_json_is_refused(self, server: Server, path: str, media_type: str) -> None:
        reply = server.post(path, {"prompt": "x"}, {"Content-Type": media_type})
        assert (reply.status, reply.error["code"]) == (415, "unsupported_media_type")
        assert server.engine.submitted == []

    def test_what_is_compressed_is_refused(self, server: Server) -> None:
        reply = server.post(
            "/v1/completions", gzip.compress(b'{"prompt": "x"}'), {"Content-Encoding": "gzip"}
        )
        assert (reply.status, reply.error["code"]) == (415, "unsupported_media_type")
        assert "gzip" in reply.error["message"]

    @pytest.mark.parametrize("media_type", ["application/json; charset=utf-8", "Application/JSON"])
    def test_json_by_other_spellings(self, server: Server, media_type: str) -> None:
        assert server.post("/tokenize", {"prompt": "x"}, {"Content-Type": media_type}).status == 200

    def test_nothing_said_is_taken_for_json(self, server: Server) -> None:
        assert server.request("POST", "/tokenize", b'{"prompt": "x"}').status == 200


class TestSizes:
    def test_a_declared_size_is_refused_before_a_byte_is_sent(self, server: Server) -> None:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 6000001\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 413 ")

    def test_an_undeclared_size_is_refused_on_the_way(self, make_server: Callable[..., Server]) -> None:
        server = make_server(max_request_bytes=1000)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        chunks = (b"x" * 400 for _ in range(4))
        connection.request("POST", "/v1/completions", chunks, encode_chunked=True)
        response = connection.getresponse()
        assert response.status == 413
        connection.close()

    def test_the_largest_body_is_taken(self, make_server: Callable[..., Server]) -> None:
        server = make_server(max_request_bytes=1000)
        body = b'{"prompt": "x"}'
        assert server.post("/v1/completions", body.ljust(1000)).status == 200
        assert server.post("/v1/completions", body.ljust(1001)).status == 413

    def test_headers(self, server: Server) -> None:
        assert server.get("/health/live", {f"X-{n}": "v" for n in range(101)}).status == 431
        assert server.get("/health/live", {"X-Long": "v" * 16_400}).status == 431
        assert server.get("/health/live", {f"X-{n}": "v" for n in range(50)}).status == 200


class TestMethodsAndPaths:
    def test_wrong_method(self, server: Server) -> None:
        reply = server.get("/v1/chat/completions")
        assert (reply.status, reply.error["code"], reply.headers["allow"]) == (
            405,
            "method_not_allowed",
            "POST",
        )

    def test_wrong_path(self, server: Server) -> None:
        assert (server.get("/v2").status, server.get("/v2").error["code"]) == (404, "not_found")

    def test_no_other_origin_is_let_in(self, server: Server) -> None:
        reply = server.get("/v1/models", {"Origin": "https://elsewhere.example"})
        assert "access-control-allow-origin" not in reply.headers
        asked = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
        refused = server.request("OPTIONS", "/v1/chat/completions", headers=asked)
        assert refused.status == 405
        assert "start it with --allowed-origins" in refused.error["message"]


class TestOtherOrigins:
    PAGE = "https://app.example"

    @pytest.fixture
    def server(self, make_server: Callable[..., Server]) -> Server:
        return make_server(allowed_origins=(self.PAGE,), api_keys=("k",))

    def preflight(self, server: Server, origin: str) -> Reply:
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        return server.request("OPTIONS", "/v1/completions", headers={"Origin": origin, **asked})

    def test_a_page_that_is_let_in(self, server: Server) -> None:
        asked = self.preflight(server, self.PAGE)
        assert (asked.status, asked.headers["access-control-allow-origin"]) == (200, self.PAGE)
        assert asked.headers["access-control-allow-headers"] == "authorization"
        reply = server.get("/v1/models", {"Origin": self.PAGE, "Authorization": "Bearer k"})
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, self.PAGE)
        assert "x-request-id" in reply.headers["access-control-expose-headers"]
        # A refusal is readable there, too.
        assert server.get("/v1/models", {"Origin": self.PAGE}).headers["access-control-allow-origin"]

    def test_any_other_page(self, server: Server) -> None:
        assert self.preflight(server, "https://evil.example").status == 400
        reply = server.get("/v1/models", {"Origin": "https://evil.example", "Authorization": "Bearer k"})
        assert "access-control-allow-origin" not in reply.headers

    def test_streams_too(self, server: Server) -> None:
        headers = {"Origin": self.PAGE, "Authorization": "Bearer k"}
        reply = server.post("/v1/completions", {"prompt": "x", "stream": True}, headers)
        assert reply.events
        assert reply.headers["access-control-allow-origin"] == self.PAGE


class TestQueue:
    def test_past_the_bound_429_and_after_a_start_room_again(
        self, make_server: Callable[..., Server]
    ) -> None:
        server = make_server(prepare=lambda engine: engine.set_loading(), max_queue=2)
        first = server.open_stream(n=2)
        assert server.engine.submit_seen.wait(10)
        reply = server.chat()
        assert (reply.status, reply.error["code"]) == (429, "queue_full")
        assert int(reply.headers["retry-after"]) >= 1
        assert server.get("/status").json["queue"] == {"waiting": 2, "limit": 2, "in_flight": 2}
        server.engine.become_ready()
        with first, first.makefile("rb") as lines:
            assert any(b"[DONE]" in line for line in lines)
        assert server.chat().status == 200

    def test_more_than_could_ever_wait(self, make_server: Callable[..., Server]) -> None:
        server = make_server(max_queue=2)
        assert (server.chat(n=3).status, server.chat(n=3).error["param"]) == (400, "n")

    def test_a_client_that_gives_up_waiting_leaves_the_queue(
        self, make_server: Callable[..., Server]
    ) -> None:
        server = make_server(prepare=lambda engine: engine.set_loading(), max_queue=1)
        waiting = server.open_stream()
        assert server.engine.submit_seen.wait(10)
        server.engine.abort_seen.clear()
        waiting.close()
        assert server.engine.abort_seen.wait(10)
        server.engine.become_ready()
        assert server.chat().status == 200
