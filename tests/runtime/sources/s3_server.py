"""What the tests of S3 share: uploads, and a faulty door before moto's server."""

from __future__ import annotations

import http.client
import re
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast, get_args

from tests.runtime.sources.hub_server import Lie, lying_range, reset
from tests.runtime.sources.models import NEEDED, model_files

_LIES = get_args(Lie)


def needed_files(weight_bytes: int = 100_000, seed: int = 0) -> dict[str, bytes]:
    """Those of `model_files` that are fetched."""
    files = model_files(weight_bytes, seed=seed)
    return {name: files[name] for name in NEEDED}


def upload(s3: Any, files: dict[str, bytes], prefix: str = "org/name/", **options: str) -> None:
    """Put files under a prefix of the bucket `models`."""
    for name, content in files.items():
        s3.put_object(Bucket="models", Key=prefix + name, Body=content, **options)


class Door:
    """A door before an S3 server, through which the next `times` reads of model.safetensors go wrong.

    `fault` is a lie (see `lying_range`), or: cut, reset and stall, which happen after `after` bytes of the
    body (a stall ends when `released` is set); corrupt (a flipped bit); slow down (503); whole file (no
    ranges); 200 with a range; no conditions (If-Match is ignored).
    """

    def __init__(self, upstream: str, fault: str, times: int, after: int = 50_000) -> None:
        self.upstream = upstream.removeprefix("http://")
        self.fault = fault
        self.after = after
        self.released = threading.Event()
        self._sent: list[int] = []
        self._times = times
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"door": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def mend(self) -> None:
        """Let everything go right from now on, and count only what is asked for from now on."""
        with self._lock:
            self._times = 0
            self._sent = []

    @property
    def body_bytes(self) -> int:
        """How many bytes of model.safetensors went out."""
        return sum(self._sent)

    def take_fault(self, path: str) -> str | None:
        """The fault that the next request for this path meets, counted down."""
        with self._lock:
            if "model.safetensors" not in path or self._times == 0:
                return None
            self._times -= 1
            return self.fault

    def counter(self) -> Callable[[int], None]:
        """To be told how many bytes of one body went out."""
        return self._sent.append


OpenDoor = Callable[..., Door]


class _Handler(BaseHTTPRequestHandler):
    door: Door
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._forward(None)

    def do_GET(self) -> None:
        self._forward(self.door.take_fault(self.path))

    def _forward(self, fault: str | None) -> None:
        self.count = self.door.counter()
        headers = dict(self.headers.items())
        if fault == "whole file":
            headers.pop("Range", None)
        if fault == "no conditions":
            headers.pop("If-Match", None)
        status, answer, body = self._ask(headers)
        if fault == "slow down":
            status, body = 503, b"<Error><Code>SlowDown</Code></Error>"
        elif fault == "corrupt" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        elif fault == "200 with a range":
            status = 200
        elif fault in _LIES and status == 206:
            body = self._lie(cast("Lie", fault), headers, answer)
        answer["Content-Length"] = answer["Content-Length"] if self.command == "HEAD" else str(len(body))
        self.send_response(status)
        for name, value in answer.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self._send_body(fault, body)

    def _ask(self, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection(self.door.upstream)
        upstream.request(self.command, self.path, headers=headers)
        reply = upstream.getresponse()
        body = reply.read()
        upstream.close()
        answer = {name.title(): value for name, value in reply.getheaders()}
        for name in ("Connection", "Date", "Server"):
            answer.pop(name, None)
        return reply.status, answer, body

    def _lie(self, lie: Lie, headers: dict[str, str], answer: dict[str, str]) -> bytes:
        whole = {name: value for name, value in headers.items() if name != "Range"}
        _, _, content = self._ask(whole)
        start, last = map(int, re.findall(r"\d+", headers["Range"]))
        start, end, label = lying_range(lie, start, last + 1, len(content))
        answer.pop("Content-Range")
        if label:
            answer["Content-Range"] = label
        return content[start:end]

    def _send_body(self, fault: str | None, body: bytes) -> None:
        after = self.door.after if fault in ("cut", "reset", "stall") else len(body)
        self._write(body[:after])
        if fault == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif fault == "reset":
            reset(self.connection)
            self.close_connection = True
        elif fault == "stall":
            self.door.released.wait(60)
            self._write(body[after:])

    def _write(self, data: bytes) -> None:
        self.wfile.write(data)
        if "model.safetensors" in self.path:
            self.count(len(data))
