"""Server-sent events: one answer, piece by piece."""

from __future__ import annotations

from starlette.types import Send

from handler.asgi import send_headers

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
DONE = b"data: [DONE]\n\n"


class EventStream:
    """A streamed answer. Nothing is sent, the status included, before the first piece."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def _begin(self) -> None:
        if not self.begun:
            await send_headers(self._send, 200, HEADERS)
            self.begun = True

    async def write(self, events: bytes) -> None:
        """Send whole events."""
        await self._begin()
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def comment(self, text: str) -> None:
        """Send a line that clients skip, so that nothing between here and there gives up waiting."""
        await self.write(f": {text}\n\n".encode())

    async def end(self, events: bytes) -> None:
        """Send the last events and close the answer in the same breath."""
        await self._begin()
        await self._send({"type": "http.response.body", "body": events})
