"""The Starlette application: routes, middleware, and what runs beside them for as long as it lives."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from handler import idle, lifecycle, sleeping, ui
from handler.access_log import Recorded, write_line
from handler.asgi import ClientGone
from handler.auth import BearerAuth
from handler.by_model import ByModel
from handler.exposition import CONTENT_TYPE, exposition
from handler.fleet import Fleet
from handler.limits import HeaderLimits
from handler.openai.chat import ChatCompletions
from handler.openai.completions import Completions
from handler.openai.embeddings import refuse_embeddings
from handler.openai.endpoint import Endpoint
from handler.openai.errors import ApiError, as_api_error
from handler.openai.models import list_models, show_model
from handler.openai.openapi import show_openapi
from handler.openai.responses.answer import Responses
from handler.openai.tokenize import Detokenize, Tokenize, show_tokenizer
from handler.paths import PlainPaths, advice
from handler.request_id import RequestIds
from handler.service import Service
from handler.settings import ServerSettings
from handler.tracing import Tracing
from handler.version import release
from runtime.client import EngineClient, EngineUnavailable


def create_app(
    client: EngineClient,
    settings: ServerSettings,
    end: Callable[[], None] = lambda: None,
    others: Sequence[ServerSettings] = (),
) -> Starlette:
    """The application that serves a model through `client`, which its lifespan runs and closes.

    `end` is called when nobody has come for so long that the server is to end. `others` are further models,
    whose engines are started when they are first asked for.
    """
    service = Service(client, settings)
    fleet = Fleet([service, *(Service(EngineClient(other.engine), other) for other in others)])
    endpoint = settings.otlp_traces_endpoint
    tracing = Tracing(endpoint) if endpoint else None
    observers = [write_line] if settings.access_log else []
    if tracing is not None:
        observers.append(tracing.observe)
    middleware = [Middleware(RequestIds), Middleware(Recorded, observers), Middleware(HeaderLimits)]
    if settings.allowed_origins:
        middleware.append(_cross_origin(settings.allowed_origins))
    if settings.api_keys:
        middleware.append(Middleware(BearerAuth, keys=settings.api_keys))
    middleware.append(Middleware(PlainPaths))
    app = Starlette(
        routes=[
            _post("/v1/chat/completions", fleet, lambda service: Endpoint(service, ChatCompletions(service))),
            _post("/v1/completions", fleet, lambda service: Endpoint(service, Completions(service))),
            _post("/v1/responses", fleet, lambda service: Endpoint(service, Responses(service))),
            Route("/v1/embeddings", refuse_embeddings, methods=["POST"]),
            Route("/v1/models", list_models),
            Route("/v1/models/{id:path}", show_model),
            _post("/tokenize", fleet, Tokenize),
            _post("/detokenize", fleet, Detokenize),
            Route("/tokenizer_info", show_tokenizer),
            Route("/sleep", sleeping.sleep, methods=["POST"]),
            Route("/wake", sleeping.wake, methods=["POST"]),
            Route("/openapi.json", show_openapi),
            Route("/health", ready),
            Route("/health/live", live),
            Route("/health/ready", ready),
            Route("/health/startup", startup),
            Route("/status", status),
            Route("/version", show_version),
            Route("/metrics", show_metrics),
            *ui.ROUTES,
        ],
        middleware=middleware,
        exception_handlers={
            HTTPException: _http_error,
            ApiError: _api_error,
            EngineUnavailable: _api_error,
            ClientGone: _nobody,
            Exception: _unexpected,
        },
        lifespan=_lifespan,
    )
    app.state.service = service
    app.state.fleet = fleet
    app.state.tracing = tracing
    app.state.end = end
    return app


def _post(path: str, fleet: Fleet, endpoint: Callable[[Service], ASGIApp]) -> Route:
    """A route to the endpoint of the model that a request names."""
    endpoints = [endpoint(service) for service in fleet.services]
    return Route(path, endpoints[0] if len(endpoints) == 1 else ByModel(fleet, endpoints), methods=["POST"])


def _cross_origin(origins: Sequence[str]) -> Middleware:
    """Lets scripts of these origins' pages call. They send a key, where one is asked for, and no cookies."""
    from starlette.middleware.cors import CORSMiddleware

    return Middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after"],
        max_age=86_400,
    )


@contextlib.asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    service: Service = app.state.service
    fleet: Fleet = app.state.fleet
    clients = [each.client for each in fleet.services]
    engines = [asyncio.create_task(client.run(at_once=client is service.client)) for client in clients]
    beside = [
        asyncio.create_task(service.text.warm_up()),
        asyncio.create_task(lifecycle.report_start(service.client, service.admission)),
        asyncio.create_task(idle.watch(fleet.services, app.state.end)),
    ]
    try:
        yield
    finally:
        for task in beside:
            task.cancel()
        # While it loads, the engine has nothing to finish, and would not even hear the request.
        grace = service.settings.drain_seconds
        closing = [client.close(grace if lifecycle.is_ready(client) else 0) for client in clients]
        await asyncio.gather(*closing)
        await asyncio.gather(*engines, *beside, return_exceptions=True)
        if app.state.tracing is not None:
            await asyncio.to_thread(app.state.tracing.close)


async def live(request: Request) -> Response:
    """GET /health/live: 200 for as long as the process answers at all."""
    return JSONResponse({"status": "live"})


async def ready(request: Request) -> Response:
    """GET /health/ready: 200 when a request sent now is worked on now, a sleeping engine being woken for
    it; else 503 with Retry-After."""
    return _health(request, lifecycle.is_ready(request.app.state.service.client))


async def startup(request: Request) -> Response:
    """GET /health/startup: 200 from the first time that the engine was ready, 503 before."""
    return _health(request, "ready" in request.app.state.service.client.marks)


def _health(request: Request, good: bool) -> Response:
    body = lifecycle.health(request.app.state.service.client)
    if good:
        return JSONResponse(body)
    return JSONResponse(body, 503, {"Retry-After": str(lifecycle.RETRY_LOADING_SECONDS)})


async def status(request: Request) -> Response:
    """GET /status: the state, start marks, memory and queue."""
    service: Service = request.app.state.service
    fleet: Fleet = request.app.state.fleet
    body = lifecycle.status(service.client, service.model, service.admission)
    if len(fleet.services) > 1:
        body["models"] = {each.model: lifecycle.health(each.client) for each in fleet.services}
    return JSONResponse(body)


async def show_version(request: Request) -> Response:
    """GET /version: which release this is."""
    return JSONResponse({"version": release()})


async def show_metrics(request: Request) -> Response:
    """GET /metrics: Prometheus' text format."""
    return Response(exposition(request.app.state.fleet.services), media_type=CONTENT_TYPE)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:200]
    if error.status_code == 404 and error.detail == "Not Found":
        answer = ApiError(404, f"There is nothing at {path}; {advice(path)}", code="not_found")
    elif error.status_code == 405:
        message = f"{path} does not take {request.method}."
        if request.method == "OPTIONS" and (origin := request.headers.get("origin")):
            message = (
                f"Pages of {origin[:200]} may not call this server: start it with --allowed-origins for that."
            )
        answer = ApiError(405, message, code="method_not_allowed", headers=error.headers)
    else:
        answer = ApiError(error.status_code, error.detail, headers=error.headers)
    return _answer(answer)


async def _api_error(request: Request, error: Exception) -> Response:
    return _answer(as_api_error(error))


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _unexpected(request: Request, error: Exception) -> Response:
    traceback.print_exception(error, file=sys.stderr)
    return _answer(as_api_error(error))


def _answer(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)
