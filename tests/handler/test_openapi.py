"""The OpenAPI document is valid, and says what the server really takes and answers."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openapi_spec_validator
import pytest
from pydantic import ValidationError

from handler.app import create_app
from handler.openai.fields import _WITHOUT_EFFECT
from handler.openai.openapi import document
from handler.openai.schema import ChatRequest
from tests.handler.conftest import MODEL, Server
from tests.handler.test_tools import TOOLS

USER = [{"role": "user", "content": "Hi"}]


def validate(name: str, value: Any) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document()["components"]}
    jsonschema.Draft202012Validator(schema).validate(value)


def test_it_is_a_valid_document(server: Server) -> None:
    shown = server.get("/openapi.json").json
    openapi_spec_validator.validate(shown)
    assert shown == document()


def test_its_paths_are_the_servers(server: Server) -> None:
    app = create_app(server.engine, server.settings)  # type: ignore[arg-type]  # the client's interface
    routes = {
        (route.path.replace(":path", ""), method.lower())  # type: ignore[attr-defined]
        for route in app.routes
        for method in route.methods or ("GET",)  # type: ignore[attr-defined]
        if method != "HEAD"
    }
    told = {(path, method) for path, item in document()["paths"].items() for method in item}
    pages = {(path, method) for path, method in routes if path == "/" or path.startswith("/ui")}
    assert told == routes - pages


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 2, "logprobs": True, "top_logprobs": 2},
        {"prompt_logprobs": 1, "return_token_ids": True},
        {"max_tokens": 3, "stop": "l"},
    ],
)
def test_chat_answers(server: Server, fields: dict[str, Any]) -> None:
    body = {"model": MODEL, "messages": USER, **fields}
    validate("ChatRequest", body)
    validate("ChatCompletion", server.post("/v1/chat/completions", body).json)
    if "prompt_logprobs" not in fields:
        options = {"include_usage": True}
        for event in server.post(
            "/v1/chat/completions", body | {"stream": True, "stream_options": options}
        ).events:
            validate("ChatCompletionChunk", event)


def test_answers_with_calls_and_reasoning(make_server: Any) -> None:
    server = make_server('[{"name": "time", "arguments": {"a": 1}}]', reasoning_parser="qwen3")
    tools = [TOOLS[1]]
    body = {"messages": USER, "tools": tools}
    validate("ChatRequest", body)
    answer = server.post("/v1/chat/completions", body).json
    assert answer["choices"][0]["message"]["tool_calls"]
    validate("ChatCompletion", answer)
    for event in server.post("/v1/chat/completions", body | {"stream": True}).events:
        validate("ChatCompletionChunk", event)
    flat = {"input": "Hi", "tools": [{"type": "function", **tools[0]["function"]}]}
    validate("ResponsesRequest", flat)
    validate("Response", server.post("/v1/responses", flat).json)
    server = make_server("<think>So.</think>Yes.", reasoning_parser="qwen3")
    validate("ChatCompletion", server.chat().json)
    response = server.post("/v1/responses", {"input": "Hi"}).json
    assert response["output"][0]["type"] == "reasoning"
    validate("Response", response)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": ["a", "b"], "n": 2, "best_of": 3},
        {"echo": True, "logprobs": 1, "prompt_logprobs": 1, "max_tokens": 0},
        {"prompt": [1, 2], "return_token_ids": True},
    ],
)
def test_completions(server: Server, fields: dict[str, Any]) -> None:
    body = {"prompt": "Once", **fields}
    validate("CompletionRequest", body)
    validate("Completion", server.post("/v1/completions", body).json)
    if not fields.keys() & {"best_of", "prompt_logprobs"}:
        for event in server.post("/v1/completions", body | {"stream": True}).events:
            validate("CompletionChunk", event)


def test_responses(server: Server) -> None:
    for fields in ({}, {"max_output_tokens": 3}, {"top_logprobs": 1}):
        validate("ResponsesRequest", {"input": "Hi", **fields})
        validate("Response", server.post("/v1/responses", {"input": "Hi", **fields}).json)


def test_the_others(server: Server) -> None:
    validate("ModelList", server.get("/v1/models").json)
    validate("Model", server.get(f"/v1/models/{MODEL}").json)
    validate("Tokens", server.post("/tokenize", {"prompt": "Hi", "return_token_strs": True}).json)
    validate("Tokenizer", server.get("/tokenizer_info").json)
    validate("Text", server.post("/detokenize", {"tokens": [1, 2]}).json)
    validate("Status", server.get("/status").json)
    validate("Error", server.chat(temperature=9).json)
    validate("Error", server.get("/nowhere").json)


def test_what_it_forbids_is_refused_and_what_it_allows_is_taken(server: Server) -> None:
    harmless = dict.fromkeys(_WITHOUT_EFFECT)
    validate("ChatRequest", {"messages": USER, **harmless, "user": "u", "temperature": None})
    assert server.chat(**harmless, temperature=None).status == 200
    for wrong in ({"temperature": 3}, {"n": 0}, {"colour": "red"}, {"stop": [""]}, {"messages": []}):
        with pytest.raises(jsonschema.ValidationError):
            validate("ChatRequest", {"messages": USER, **wrong})
        with pytest.raises(ValidationError):
            ChatRequest.model_validate({"messages": USER, **wrong})
        assert server.post("/v1/chat/completions", {"messages": USER, **wrong}).status == 400


def test_it_can_be_read_by_machines() -> None:
    assert json.loads(json.dumps(document())) == document()
