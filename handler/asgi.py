"""Small pieces of ASGI that every endpoint shares."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from starlette.types import Receive, Send

if TYPE_CHECKING:
    from handler.openai.errors import ApiError


class ClientGone(Exception):
    """Nobody is left to answer: the client closed the connection."""


async def send_bytes(
    send: Send,
    status: int,
    body: bytes,
    content_type: str = "application/json",
    headers: Mapping[str, str] = {},
) -> None:
    """One whole answer."""
    await send_headers(
        send, status, {"content-length": str(len(body)), "content-type": content_type, **headers}
    )
    await send({"type": "http.response.body", "body": body})


async def send_headers(send: Send, status: int, headers: Mapping[str, str]) -> None:
    """The beginning of an answer."""
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def send_error(send: Send, error: ApiError) -> None:
    """An error as a whole answer."""
    await send_bytes(send, error.status, error.encoded(), headers=error.headers)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`, whose request body has been read; cancel it and raise `ClientGone` if the client leaves."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        task.result()
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.gather(watcher, task, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
