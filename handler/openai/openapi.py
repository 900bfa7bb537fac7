"""GET /openapi.json: what this server takes and answers, as an OpenAPI 3.1 document."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from handler.openai.answer_schemas import BOOLEAN, SCHEMAS, STRING, ref
from handler.openai.responses.schema import ResponsesRequest
from handler.openai.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    SleepRequest,
    TokenizeRequest,
    WakeRequest,
)
from handler.openai.strict import Strict


@dataclass(frozen=True)
class _Post:
    """A route that takes a body: the request, the answer, and one event of a streamed answer."""

    summary: str
    request: type[Strict] | None = None
    answer: str | None = None
    event: str | None = None
    body_required: bool = True


_POSTS = {
    "/v1/chat/completions": _Post(
        "Answer a conversation", ChatRequest, "ChatCompletion", "ChatCompletionChunk"
    ),
    "/v1/completions": _Post("Continue a prompt", CompletionRequest, "Completion", "CompletionChunk"),
    "/v1/responses": _Post(
        "Answer in the shape of the Responses API", ResponsesRequest, "Response", "ResponseEvent"
    ),
    "/v1/embeddings": _Post("Refused: the model generates text"),
    "/tokenize": _Post("A prompt's or a conversation's token ids", TokenizeRequest, "Tokens"),
    "/detokenize": _Post("The text of token ids", DetokenizeRequest, "Text"),
    "/sleep": _Post("Free the device's memory", SleepRequest, "Health", body_required=False),
    "/wake": _Post("Take the memory back, and the weights in", WakeRequest, "Health", body_required=False),
}
_GETS = {
    "/v1/models": ("The names that requests may use", "ModelList"),
    "/v1/models/{id}": ("One of them", "Model"),
    "/tokenizer_info": ("Special tokens, chat template and context length", "Tokenizer"),
    "/health": ("The same as /health/ready", "Health"),
    "/health/live": ("200 while the process answers", "Health"),
    "/health/ready": ("200 when a request sent now is worked on now, else 503", "Health"),
    "/health/startup": ("200 once the engine has been ready, 503 before", "Health"),
    "/status": ("State, start marks, memory and queue", "Status"),
    "/version": ("Which release this is", "Version"),
}
_ERRORS = {
    "400": "The request cannot be served as it is written",
    "401": "A key is asked for",
    "404": "There is no such model or path",
    "413": "The body is too large",
    "415": "The body is no JSON",
    "429": "Too many requests are waiting; see Retry-After",
    "500": "The server failed",
    "503": "The engine is not available; see Retry-After",
}
# Fields that OpenAI documents to change nothing about the answer; see `handler.openai.fields`.
_HARMLESS = {
    "user": STRING,
    "metadata": {"type": "object", "additionalProperties": STRING},
    "store": BOOLEAN,
    "safety_identifier": STRING,
    "prompt_cache_key": STRING,
    "prompt_cache_options": {"type": "object"},
    "prompt_cache_retention": STRING,
    "service_tier": {"type": "string", "enum": ["auto", "default"]},
}


async def show_openapi(request: Request) -> Response:
    """GET /openapi.json."""
    return JSONResponse(document())


@cache
def document() -> dict[str, Any]:
    """The whole document. Keys are asked for where the server has any: see `security`."""
    from pydantic.json_schema import models_json_schema

    requests = [post.request for post in _POSTS.values() if post.request is not None]
    _, schemas = models_json_schema(
        [(model, "validation") for model in requests], ref_template="#/components/schemas/{model}"
    )
    defined = schemas["$defs"]
    for model in requests:
        _complete(defined[model.__name__])
    paths = {path: {"post": _post(post)} for path, post in _POSTS.items()}
    paths |= {path: {"get": _get(path, *entry)} for path, entry in _GETS.items()}
    paths["/metrics"] = {"get": _plain("Counters for Prometheus", "text/plain")}
    paths["/openapi.json"] = {"get": _plain("This document", "application/json")}
    return {
        "openapi": "3.1.0",
        "info": {"title": "firstlight", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": {**defined, **SCHEMAS},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _complete(schema: dict[str, Any]) -> None:
    """Adds what holds for a whole request: harmless fields may be there, and null is the same as absent."""
    properties = {**_HARMLESS, **schema["properties"]}
    required = schema.get("required", [])
    for name, field in properties.items():
        if name not in required and {"type": "null"} not in field.get("anyOf", []):
            properties[name] = {"anyOf": [field, {"type": "null"}]}
    schema["properties"] = properties


def _post(post: _Post) -> dict[str, Any]:
    responses = _errors()
    operation: dict[str, Any] = {"summary": post.summary, "responses": responses}
    if post.request is not None:
        content = {"application/json": {"schema": ref(post.request.__name__)}}
        operation["requestBody"] = {"required": post.body_required, "content": content}
    if post.answer is not None:
        content = {"application/json": {"schema": ref(post.answer)}}
        described = "The answer"
        if post.event is not None:
            content["text/event-stream"] = {"schema": _event(post.event)}
            described += '; with "stream": true, a series of server-sent events'
        responses["200"] = {"description": described, "content": content}
    return operation


def _event(name: str) -> dict[str, Any]:
    """One server-sent event. The last one of completions is `[DONE]`."""
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": ref(name)}
    return {"type": "object", "properties": {"event": STRING, "data": data}, "required": ["data"]}


def _get(path: str, summary: str, answer: str) -> dict[str, Any]:
    content = {"application/json": {"schema": ref(answer)}}
    responses = {**_errors(), "200": {"description": summary, "content": content}}
    if path.startswith("/health"):
        responses["503"] = {"description": "Not yet", "content": content}
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if "{id}" in path:
        operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": STRING}]
    return operation


def _plain(summary: str, media_type: str) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": summary, "content": {media_type: {}}}}}


def _errors() -> dict[str, Any]:
    content = {"application/json": {"schema": ref("Error")}}
    return {status: {"description": text, "content": content} for status, text in _ERRORS.items()}
