"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from handler.fleet import Fleet
from handler.service import Service

_created = int(time.time())


async def list_models(request: Request) -> Response:
    """Every name that requests may use."""
    fleet: Fleet = request.app.state.fleet
    data = [_describe(fleet.find(name), name) for name in fleet.names]
    return JSONResponse({"object": "list", "data": data})


async def show_model(request: Request) -> Response:
    """One of them."""
    fleet: Fleet = request.app.state.fleet
    name: str = request.path_params["id"]
    return JSONResponse(_describe(fleet.find(name), name))


def _describe(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": _created,
        "owned_by": "firstlight",
        "root": service.settings.engine.model.id,
        "parent": None,
        "max_model_len": service.text.max_model_len,
    }
