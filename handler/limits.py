"""Bounds that are checked before work is done: headers, bodies, nesting, and how many may wait."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from handler.asgi import ClientGone, send_error
from handler.openai.errors import ApiError

MAX_HEADERS = 100
MAX_HEADER_BYTES = 16_384
MAX_JSON_DEPTH = 32
# Larger bodies are decoded in a thread, so that other streams keep flowing.
_INLINE_BYTES = 65_536


class HeaderLimits:
    """ASGI middleware: refuses requests with too many or too large headers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = scope["headers"]
            size = sum(len(name) + len(value) for name, value in headers)
            if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
                message = f"The headers exceed {MAX_HEADERS} lines or {MAX_HEADER_BYTES} bytes."
                await send_error(send, ApiError(431, message, code="headers_too_large"))
                return
        await self.app(scope, receive, send)


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """The whole request body. Raises `ApiError` 415 if it is not JSON, 413 as soon as it is too large."""
    too_large = ApiError(413, f"The request body is larger than {max_bytes} bytes.", code="request_too_large")
    headers = dict(scope["headers"])
    _check_media_type(headers.get(b"content-type", b"application/json"))
    _check_coding(headers.get(b"content-encoding", b"identity"))
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_large
    chunks = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > max_bytes:
            raise too_large
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _check_media_type(content_type: bytes) -> None:
    """A page of another origin can send anything but JSON without asking the server first."""
    media_type = content_type.split(b";")[0].strip().lower()
    if media_type != b"application/json" and not media_type.endswith(b"+json"):
        shown = media_type.decode("latin-1")[:100] or "of no type"
        message = f"The body is said to be {shown}; send it with 'Content-Type: application/json'."
        raise ApiError(415, message, code="unsupported_media_type")


def _check_coding(coding: bytes) -> None:
    if coding.lower() != b"identity":
        message = f"The body is encoded with {coding.decode('latin-1')[:100]}; send it as it is."
        raise ApiError(415, message, code="unsupported_media_type")


async def decode_json(body: bytes) -> Any:
    """The value in a JSON body. Raises `ApiError` 400 for what is not JSON or is nested too deeply."""
    if len(body) > _INLINE_BYTES:
        return await asyncio.to_thread(_decode, body)
    return _decode(body)


def _decode(body: bytes) -> Any:
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise _too_deep() from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ApiError(400, f"The request body is not valid JSON: {error}.", code="invalid_json") from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raise `ApiError` 400 for a decoded JSON value that is nested too deeply."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_JSON_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> ApiError:
    message = f"The request body is nested more than {MAX_JSON_DEPTH} levels deep."
    return ApiError(400, message, code="invalid_json")


class Admission:
    """Counts the sequences that wait for their first token, and refuses more than `max_queue`."""

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self.waiting = 0
        self.any_began = False
        self.settled = asyncio.Event()  # set while nobody waits, and for good once anybody has begun
        self.settled.set()

    @contextmanager
    def admit(self, sequences: int) -> Iterator[Ticket]:
        """A place in the queue for a request of so many sequences, until it starts or ends.

        Raises `ApiError` 429 when the queue is full, 400 when it could never be long enough.
        """
        if sequences > self.max_queue:
            message = (
                f"The request asks for {sequences} sequences; this server takes {self.max_queue} at most."
            )
            raise ApiError(400, message, param="n", code="invalid_value")
        if self.waiting + sequences > self.max_queue:
            message = f"{self.waiting} sequences are waiting already; try again in a moment."
            raise ApiError(429, message, code="queue_full", retry_after=2)
        ticket = Ticket(self, sequences)
        self.waiting += sequences
        if not self.any_began:
            self.settled.clear()
        try:
            yield ticket
        finally:
            ticket.leave_queue()


class Ticket:
    """One request's place in the queue."""

    def __init__(self, admission: Admission, sequences: int) -> None:
        self._admission = admission
        self._sequences = sequences

    def begin(self) -> None:
        """The request has got its first token."""
        self._admission.any_began = True
        self._admission.settled.set()
        self.leave_queue()

    def leave_queue(self) -> None:
        """The request waits no longer, for whatever reason."""
        self._admission.waiting -= self._sequences
        self._sequences = 0
        if self._admission.waiting == 0:
            self._admission.settled.set()
