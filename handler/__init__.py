"""Process 1: how invocations come in and answers go out. Never imports torch."""

from __future__ import annotations

from typing import Any


def lambda_handler(event: Any, context: object) -> dict[str, Any]:
    """AWS Lambda's entry point: answers function URL events (payload 2.0) and bare OpenAI bodies.

    Settings come from the environment (`FIRSTLIGHT_...`). The first call starts the engine.
    """
    from handler.platforms.function_url import handle

    return handle(event, context)
