"""Bearer keys. The check stands in front of everything else and looks at the raw path."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from handler import ui
from handler.asgi import send_error
from handler.openai.errors import ApiError

# Platforms probe these without a key; the page is public, the calls that it makes are not.
PUBLIC_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/health/startup"}) | ui.PATHS


class BearerAuth:
    """ASGI middleware: every path but `PUBLIC_PATHS` needs `Authorization: Bearer KEY` with one of `keys`."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PUBLIC_PATHS or self._allowed(scope):
            await self.app(scope, receive, send)
            return
        message = "The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'."
        error = ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await send_error(send, error)

    def _allowed(self, scope: Scope) -> bool:
        for name, value in scope["headers"]:
            if name == b"authorization":
                scheme, _, key = value.partition(b" ")
                # Every key is compared, so that the time taken says nothing about which one came close.
                matches = [hmac.compare_digest(key.strip(), known) for known in self.keys]
                return scheme.lower() == b"bearer" and any(matches)
        return False
