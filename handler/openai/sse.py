"""Server-sent events: one answer, piece by piece."""

from __future__ import annotations

import time

from starlette.types import Scope, Send

from handler.asgi import send_headers
from handler.connection import connection_of

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
DONE = b"data: [DONE]\n\n"


class EventStream:
    """A streamed answer. Nothing is sent, the status included, before the first piece."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._send = send
        self._connection = connection_of(scope)
        self.begun = False
        self.written = time.monotonic()  # when the last piece was

    async def _begin(self) -> None:
        if not self.begun:
            await send_headers(self._send, 200, HEADERS)
            self.begun = True

    async def write(self, events: bytes) -> None:
        """Send whole events."""
        await self._begin()
        self.written = time.monotonic()
        if self._connection is not None:
            await self._connection.write_piece(events)
        else:
            await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def comment(self, text: str) -> None:
        """Send a line that clients skip, so that nothing between here and there gives up waiting."""
        await self.write(f": {text}\n\n".encode())

    async def end(self, events: bytes) -> None:
        """Send the last events and close the answer in the same breath."""
        await self._begin()
        await self._send({"type": "http.response.body", "body": events})
