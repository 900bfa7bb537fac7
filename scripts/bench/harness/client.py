"""HTTP requests over plain sockets: light, and with times taken where the bytes are."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any

from harness.sse import Answer, Recording, read

_READ_BYTES = 1 << 16


def completion_request(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    """The whole request, head and body, of a streamed answer whose token counts come with it."""
    asked = {"stream": True, "stream_options": {"include_usage": True}, **body}
    raw = json.dumps(asked).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + raw


def connect(port: int, timeout: float) -> socket.socket:
    """A connection to a server on this machine. Raises OSError while nobody listens."""
    return socket.create_connection(("127.0.0.1", port), timeout)


def stream_on(connection: socket.socket, request: bytes) -> Answer:
    """Send a request that `completion_request` made and read its answer to the end."""
    recording = Recording()
    connection.sendall(request)
    while not recording.ended and (data := connection.recv(_READ_BYTES)):
        recording.add(data)
    return read(recording)


def stream(port: int, body: dict[str, Any], timeout: float = 600.0) -> Answer:
    """One streamed completion."""
    with connect(port, timeout) as connection:
        return stream_on(connection, completion_request(body))


def get(port: int, path: str, timeout: float = 10.0) -> tuple[int, bytes]:
    """Status and body of a GET request. Raises OSError if there is no answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except http.client.HTTPException as error:
        raise OSError(f"GET {path}: {error!r}") from error
    finally:
        connection.close()
