"""A connection that pieces of a streamed answer can be written to directly.

An answer has a piece for every token. ASGI's way out leads each of them through every middleware and
through the state machine of the HTTP parser, which costs more than making the piece did; yet between the
first piece and the last there is nothing for either of them to do.
"""

from __future__ import annotations

from typing import Any

from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from handler.openai.errors import ApiError

_KEY = "connection"


class Connection(H11Protocol):
    """uvicorn's connection, which the application finds in the scope; see `connection_of`."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.app_state = {**self.app_state, _KEY: self}

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is refused as everything else is."""
        body = ApiError(400, msg, code="invalid_http").encoded()
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
        self.transport.write(head % len(body) + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    async def write_piece(self, data: bytes) -> None:
        """Send a piece of the body of an answer that has begun, and has no `content-length`.

        Waits while the client does not keep up. A client that has left is noticed where the request is
        read, not here.
        """
        if self.flow.write_paused:
            await self.flow.drain()
        if not self.transport.is_closing():
            # Chunked transfer coding, RFC 9112, 7.1.
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


def connection_of(scope: Scope) -> Connection | None:
    """The connection of a request, unless it came some other way or does not know chunks (HTTP/1.0)."""
    connection: Connection | None = scope.get("state", {}).get(_KEY)
    return connection if scope.get("http_version") == "1.1" else None
