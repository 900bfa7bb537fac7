"""The access log: a line of JSON for each request when it is over, and who else wants to know then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from handler import ui
from handler.record import Record

# What machines ask for every few seconds, and what belongs to the page.
_UNLOGGED = frozenset({"/health", "/health/live", "/health/ready", "/health/startup", "/metrics"}) | ui.PATHS

Observer = Callable[[Record], None]


class Recorded:
    """ASGI middleware: keeps a `Record` of each request and hands it to the observers at its end."""

    def __init__(self, app: ASGIApp, observers: Sequence[Observer]) -> None:
        self.app = app
        self.observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = Record.begin(scope)

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start" and record.status is None:
                record.status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        finally:
            record.seconds = record.elapsed
            for observe in self.observers:
                observe(record)


def write_line(record: Record) -> None:
    """Write a request's line to stderr, unless it is one that only fills logs."""
    if record.path in _UNLOGGED and record.error is None:
        return
    now = time.gmtime(record.began_ns // 10**9)
    line: dict[str, Any] = {
        "event": "request",
        "time": time.strftime("%Y-%m-%dT%H:%M:%S", now) + f".{record.began_ns // 10**6 % 1000:03}Z",
        "request_id": record.request_id,
        "client": record.client,
        "method": record.method,
        "path": record.path[:200],
        "status": record.status,
        "seconds": round(record.seconds, 6),
    }
    if record.error is not None:
        line["error"] = record.error
    if record.id is not None:
        line |= {
            "id": record.id,
            "model": record.model,
            "stream": record.stream,
            "choices": record.choices,
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "completion_tokens": record.completion_tokens,
            "finish_reasons": record.finish_reasons,
            "queue_seconds": _rounded(record.queue),
            "ttft_seconds": _rounded(record.ttft),
        }
    sys.stderr.write(msgspec.json.encode(line).decode() + "\n")
    sys.stderr.flush()


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
