"""POST /sleep and POST /wake."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from handler import lifecycle
from handler.fleet import Fleet
from handler.limits import decode_json, read_body
from handler.openai.schema import SleepRequest, WakeRequest
from handler.openai.strict import Strict, parse

T = TypeVar("T", bound=Strict)


async def sleep(request: Request) -> Response:
    """Once nothing runs any more, free the device's memory; answered when that is done.

    `level` is 1 (the weights wait in main memory) or 2 (in their files). All models sleep, or the one that
    is named.
    """
    asked = await _read(request, SleepRequest)
    fleet: Fleet = request.app.state.fleet
    chosen = fleet.find(asked.model)
    services = fleet.services if asked.model is None else [chosen]
    await asyncio.gather(*(service.client.sleep(asked.level) for service in services))
    return JSONResponse(lifecycle.health(chosen.client))


async def wake(request: Request) -> Response:
    """Have the engine ready for requests; answered when it is."""
    asked = await _read(request, WakeRequest)
    fleet: Fleet = request.app.state.fleet
    service = fleet.find(asked.model)
    service.activity.restart()
    async with service.place():
        await service.client.wake()
    return JSONResponse(lifecycle.health(service.client))


async def _read(request: Request, model: type[T]) -> T:
    """What is asked for: in a JSON body, which may be left out, or, as vLLM has it, in the query."""
    fleet: Fleet = request.app.state.fleet
    body = await read_body(request.scope, request.receive, fleet.default.settings.max_request_bytes)
    query = {name: _value(name, text) for name, text in request.query_params.items()}
    asked = await decode_json(body) if body else {}
    return parse(model, query | asked if isinstance(asked, dict) else asked)


def _value(name: str, text: str) -> int | str:
    return int(text) if name == "level" and text.isdecimal() else text
