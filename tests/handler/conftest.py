"""A server around the fake engine, on a real socket, in a thread."""

from __future__ import annotations

import asyncio
import functools
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from handler.app import create_app
from handler.connection import Connection
from handler.listen import listen
from handler.settings import ServerSettings
from runtime.catalogue import ModelSpec
from runtime.protocol import EngineConfig, Submit, TokenDelta
from tests.handler.fake_engine import FakeEngine

MODEL = "tiny"
GREETING = "Hello there, friend."


@dataclass
class Reply:
    """A raw HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        assert set(self.json) == {"error"}
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    @property
    def events(self) -> list[Any]:
        """The data of a stream, which must end with [DONE]."""
        blocks = self.body.decode().split("\n\n")
        assert blocks.pop() == "", "a stream ends with a blank line"
        data = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
        assert all(block.startswith(("data: ", ": ")) for block in blocks)
        assert data.pop() == "[DONE]"
        return [json.loads(item) for item in data]


@dataclass
class Server:
    """A running server and the fake behind it."""

    engine: FakeEngine
    settings: ServerSettings
    port: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    stop: Callable[[], None] = lambda: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, {**self.headers, **(headers or {})})
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, names, response.read())
        finally:
            connection.close()

    def get(self, path: str, headers: dict[str, str] | None = None) -> Reply:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Reply:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, raw, {"Content-Type": "application/json", **(headers or {})})

    def chat(self, content: str = "Hi", **fields: Any) -> Reply:
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}
        return self.post("/v1/chat/completions", body)

    def complete(self, prompt: Any = "Once", **fields: Any) -> Reply:
        return self.post("/v1/completions", {"model": MODEL, "prompt": prompt, **fields})

    def open_stream(self, **fields: Any) -> socket.socket:
        """A connection on which a streamed chat has been asked for; the test reads what it likes."""
        body = json.dumps(
            {"messages": [{"role": "user", "content": "Hi"}], "stream": True, **fields}
        ).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        sock.sendall(head.encode() + body)
        return sock


def start(
    directory: Path,
    running: list[tuple[uvicorn.Server, threading.Thread]],
    reply: str | Callable[[Submit], str | list[TokenDelta]] = GREETING,
    prepare: Callable[[FakeEngine], None] | None = None,
    **settings: Any,
) -> Server:
    """A server whose engine says `reply`; `prepare` may change the fake before the server starts."""
    spec = ModelSpec(id=MODEL, source=str(directory), **settings.pop("spec", {}))
    config = EngineConfig(model=spec, cache_dir="/nowhere", max_model_len=512)
    said = reply if callable(reply) else (lambda submit: reply)
    engine = FakeEngine(directory, said, config)
    if prepare is not None:
        prepare(engine)
    chosen = ServerSettings(
        **{"engine": config, "served_model_names": (MODEL, "alias"), "access_log": False, **settings}
    )
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    app = create_app(engine, chosen)  # type: ignore[arg-type]  # the fake has the client's interface
    server = uvicorn.Server(
        uvicorn.Config(app, http=Connection, lifespan="on", log_config=None, timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), daemon=True)
    thread.start()
    running.append((server, thread))
    return Server(engine, chosen, port, stop=lambda: setattr(server, "should_exit", True))


_ENDS_WITHIN_S = 20


@contextmanager
def starter(directory: Path) -> Iterator[Callable[..., Server]]:
    running: list[tuple[uvicorn.Server, threading.Thread]] = []
    try:
        yield functools.partial(start, directory, running)
    finally:
        for server, _ in running:
            server.should_exit = True
        for _, thread in running:
            # How a server ends is tested with processes; one that is slow at it is not waited for here.
            thread.join(_ENDS_WITHIN_S)


@pytest.fixture
def make_server(tiny_model: Path) -> Iterator[Callable[..., Server]]:
    """Start a server of the test's own; see `start`."""
    with starter(tiny_model) as make:
        yield make


@pytest.fixture(scope="session")
def shared_server(tiny_model: Path) -> Iterator[Server]:
    with starter(tiny_model) as make:
        yield make()


@pytest.fixture
def server(shared_server: Server) -> Server:
    """A warm server whose engine greets everybody, and remembers only what this test submits."""
    shared_server.engine.submitted.clear()
    shared_server.engine.aborted.clear()
    return shared_server
