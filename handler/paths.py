"""Paths as clients put them together: with a slash too many, or below another base than `/v1`."""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

# What a client appends to its base URL, the longest first.
_CALLS = ("/chat/completions", "/completions", "/embeddings", "/responses", "/models")


class PlainPaths:
    """ASGI middleware: a slash at the end, or two in the place of one, lead to where one is meant to get.

    A redirection would do for some clients; others, curl among them, show an empty answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "http" and (path.endswith("/") or "//" in path):
            scope = {**scope, "path": re.sub("/+", "/", path).rstrip("/") or "/"}
        await self.app(scope, receive, send)


def advice(path: str) -> str:
    """What whoever asked for a path that is not there most likely wants, to follow the word "path"."""
    call = next((call for call in _CALLS if path.endswith(call)), None)
    if call is None:
        return "OpenAI's API is below /v1, and /openapi.json lists what there is."
    return f"did you mean /v1{call}? A client's base URL ends with /v1."
