"""POST /v1/embeddings: said clearly, because clients try it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from handler.openai.errors import ApiError


async def refuse_embeddings(request: Request) -> Response:
    """Always 400: the models that are served here generate text."""
    message = (
        "The model that this server runs generates text; it makes no embeddings. Use /v1/chat/completions or "
        "/v1/completions, or an embedding model elsewhere."
    )
    raise ApiError(400, message, param="model", code="unsupported_model")
