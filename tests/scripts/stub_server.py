"""A server with an OpenAI-shaped API that says what it is told to, as a chunked stream of events."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Stub(ThreadingHTTPServer):
    """Answers each completion with `pieces`, one event each, after `delay` seconds, and counts `extra`
    tokens too many."""

    daemon_threads = True

    def __init__(
        self,
        pieces: list[str],
        extra: int = 0,
        status: int = 200,
        delay: float = 0.0,
        port: int = 0,
        handler: type[Handler] | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", port), handler or Handler)
        self.pieces, self.extra, self.status, self.delay = pieces, extra, status, delay
        self.asked: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Notes how many answers are under way."""
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        yield
        with self.lock:
            self.at_once -= 1

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class Handler(BaseHTTPRequestHandler):
    server: Stub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with self.server.counted():
            self._answer(body)

    def _answer(self, body: dict[str, Any]) -> None:
        time.sleep(self.server.delay)
        pieces = (self.server.pieces * body["max_tokens"])[: body["max_tokens"]]
        for piece in pieces:
            self._event({"choices": [{"index": 0, "text": piece, "finish_reason": None}]})
        self._event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        counts = {
            "prompt_tokens": len(body["prompt"]),
            "completion_tokens": len(pieces) + self.server.extra,
        }
        self._event({"choices": [], "usage": counts})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, data: Any) -> None:
        self._chunk(b"data: " + json.dumps(data).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def log_message(self, *arguments: Any) -> None:
        """Nothing is logged."""


@contextmanager
def stub(pieces: list[str], **settings: Any) -> Iterator[Stub]:
    """A stub that listens until the block is left."""
    server = Stub(pieces, **settings)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
