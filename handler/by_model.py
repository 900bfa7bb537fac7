"""One door for several models: hands a request to the endpoint of the model that its body names."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from handler.asgi import ClientGone, send_error
from handler.fleet import Fleet
from handler.limits import read_body
from handler.openai.errors import ApiError


class _Named(msgspec.Struct):
    """The one field that matters here; the endpoint looks at all of them."""

    model: Any = None


class ByModel:
    """An ASGI application; `endpoints` are those of the fleet's models, in their order."""

    def __init__(self, fleet: Fleet, endpoints: list[ASGIApp]) -> None:
        self._fleet = fleet
        self._endpoints = dict(zip((s.model for s in fleet.services), endpoints, strict=True))
        self._max_bytes = fleet.default.settings.max_request_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(scope, receive, self._max_bytes)
            name = _model_of(body)
            service = self._fleet.find(name if isinstance(name, str) else None)
        except ClientGone:
            return
        except ApiError as error:
            await send_error(send, error)
            return
        await self._endpoints[service.model](scope, _again(body, receive), send)


def _model_of(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body, type=_Named).model
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None  # the endpoint says what is wrong with it


def _again(body: bytes, receive: Receive) -> Receive:
    """What gives a body that was read already once more, and then whatever comes."""
    first = [True]

    async def receive_again() -> Message:
        if first:
            first.clear()
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return receive_again
