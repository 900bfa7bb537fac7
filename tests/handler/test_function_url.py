"""Function URL events in, answers out, through the same application."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from handler.app import create_app
from handler.platforms.function_url import FunctionUrl
from handler.settings import ServerSettings
from runtime.catalogue import ModelSpec
from runtime.protocol import EngineConfig
from tests.handler.conftest import GREETING
from tests.handler.fake_engine import FakeEngine

KEY = "the-key"


def event(path: str = "/", method: str = "GET", **changes: Any) -> dict[str, Any]:
    """An event as a function URL sends it, payload format 2.0."""
    headers = changes.pop("headers", {})
    return {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": path,
        "rawQueryString": "",
        "headers": {
            "accept": "*/*",
            "content-length": "0",
            "host": "abcdefgh.lambda-url.eu-central-1.on.aws",
            "user-agent": "curl/8.5.0",
            "x-amzn-trace-id": "Root=1-5e66d96f-7491f09xmpl79d18acf3d050",
            "x-forwarded-for": "10.9.8.7",
            "x-forwarded-port": "443",
            "x-forwarded-proto": "https",
            **headers,
        },
        "requestContext": {
            "accountId": "anonymous",
            "apiId": "abcdefgh",
            "authentication": None,
            "domainName": "abcdefgh.lambda-url.eu-central-1.on.aws",
            "domainPrefix": "abcdefgh",
            "http": {
                "method": method,
                "path": path,
                "protocol": "HTTP/1.1",
                "sourceIp": "203.0.113.9",
                "userAgent": "curl/8.5.0",
            },
            "requestId": "e1506fd5-9e7b-434f-bd42-4f8fa224b599",
            "routeKey": "$default",
            "stage": "$default",
            "time": "12/Mar/2026:19:03:58 +0000",
            "timeEpoch": 1773342238000,
        },
        "isBase64Encoded": False,
        **changes,
    }


async def show(request: Request) -> Response:
    """What arrived, as JSON."""
    return JSONResponse(
        {
            "path": request.scope["path"],
            "raw_path": request.scope["raw_path"].decode(),
            "query": request.scope["query_string"].decode(),
            "client": request.scope["client"][0],
            "cookies": request.cookies,
            "headers": dict(request.headers),
            "body": base64.b64encode(await request.body()).decode(),
        }
    )


async def set_cookies(request: Request) -> Response:
    response = PlainTextResponse("ok", headers={"x-one": "1"})
    response.set_cookie("a", "1")
    response.set_cookie("b", "2")
    response.headers.append("vary", "accept")
    response.headers.append("vary", "origin")
    return response


async def picture(request: Request) -> Response:
    return Response(b"\x89PNG\r\n\x00\xff", media_type="image/png")


async def large(request: Request) -> Response:
    return PlainTextResponse("x" * int(request.query_params["size"]))


@pytest.fixture(scope="module")
def plain() -> Iterator[FunctionUrl]:
    routes = [
        Route("/cookies", set_cookies),
        Route("/picture", picture),
        Route("/large", large),
        Route("/{rest:path}", show, methods=["GET", "POST"]),
    ]
    function = FunctionUrl(Starlette(routes=routes))
    yield function
    function.close()


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Iterator[FunctionUrl]:
    config = EngineConfig(
        model=ModelSpec(id="tiny", source="/nowhere"), cache_dir="/nowhere", max_model_len=512
    )
    engine = FakeEngine(tiny_model, lambda submit: GREETING, config)
    settings = ServerSettings(engine=config, served_model_names=("tiny",), api_keys=(KEY,))
    function = FunctionUrl(create_app(engine, settings), KEY)  # type: ignore[arg-type]  # the client's interface
    yield function
    function.close()


class TestRequests:
    def seen(self, plain: FunctionUrl, **changes: Any) -> Any:
        answer = plain(event(**changes))
        assert answer["statusCode"] == 200
        return json.loads(answer["body"])

    def test_paths_and_queries_are_kept_as_they_came(self, plain: FunctionUrl) -> None:
        query = "a=1&a=2&b=%C3%A9+%26&flag"
        seen = self.seen(plain, path="/v1/models/org%2Fname", rawQueryString=query)
        assert (seen["path"], seen["raw_path"]) == ("/v1/models/org/name", "/v1/models/org%2Fname")
        assert seen["query"] == query

    def test_the_address_is_the_one_that_lambda_saw(self, plain: FunctionUrl) -> None:
        assert self.seen(plain)["client"] == "203.0.113.9"

    def test_cookies_and_joined_headers(self, plain: FunctionUrl) -> None:
        seen = self.seen(plain, cookies=["a=1", "b=x=y"], headers={"accept": "text/html,text/plain"})
        assert seen["cookies"] == {"a": "1", "b": "x=y"}
        assert seen["headers"]["accept"] == "text/html,text/plain"

    def test_bodies_as_text_and_as_bytes(self, plain: FunctionUrl) -> None:
        text = self.seen(plain, method="POST", body='{"é": 1}')
        assert base64.b64decode(text["body"]).decode() == '{"é": 1}'
        raw = bytes(range(256))
        seen = self.seen(plain, method="POST", body=base64.b64encode(raw).decode(), isBase64Encoded=True)
        assert base64.b64decode(seen["body"]) == raw

    def test_a_missing_body_is_empty(self, plain: FunctionUrl) -> None:
        assert self.seen(plain, method="POST")["body"] == ""

    def test_base64_that_is_none(self, plain: FunctionUrl) -> None:
        answer = plain(event(method="POST", body="@@@", isBase64Encoded=True))
        assert answer["statusCode"] == 400


class TestAnswers:
    def test_cookies_stand_apart_and_other_headers_are_joined(self, plain: FunctionUrl) -> None:
        answer = plain(event("/cookies"))
        assert [cookie.partition(";")[0] for cookie in answer["cookies"]] == ["a=1", "b=2"]
        assert answer["headers"]["vary"] == "accept, origin"
        assert answer["headers"]["x-one"] == "1"
        assert "set-cookie" not in answer["headers"]
        assert (answer["body"], answer["isBase64Encoded"]) == ("ok", False)

    def test_bytes_come_as_base64(self, plain: FunctionUrl) -> None:
        answer = plain(event("/picture"))
        assert answer["isBase64Encoded"] is True
        assert base64.b64decode(answer["body"]) == b"\x89PNG\r\n\x00\xff"

    def test_what_lambda_would_not_pass_on_is_said_so(self, plain: FunctionUrl) -> None:
        assert plain(event("/large", rawQueryString="size=6000000"))["statusCode"] == 200
        answer = plain(event("/large", rawQueryString="size=6300000"))
        assert answer["statusCode"] == 413
        assert json.loads(answer["body"])["error"]["code"] == "answer_too_large"


class TestModel:
    def chat(self, model: FunctionUrl, **fields: Any) -> dict[str, Any]:
        body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
        headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
        return model(event("/v1/chat/completions", "POST", headers=headers, body=json.dumps(body)))

    def test_chat(self, model: FunctionUrl) -> None:
        answer = self.chat(model)
        assert answer["statusCode"] == 200
        assert json.loads(answer["body"])["choices"][0]["message"]["content"] == GREETING

    def test_a_stream_is_collected(self, model: FunctionUrl) -> None:
        answer = self.chat(model, stream=True)
        assert answer["headers"]["content-type"].startswith("text/event-stream")
        assert answer["isBase64Encoded"] is False
        assert answer["body"].endswith("data: [DONE]\n\n")

    def test_keys_are_asked_for(self, model: FunctionUrl) -> None:
        assert model(event("/v1/models"))["statusCode"] == 401
        assert model(event("/health/ready"))["statusCode"] == 200

    def test_bare_bodies_are_told_apart(self, model: FunctionUrl) -> None:
        chat = model({"messages": [{"role": "user", "content": "Hi"}]})
        assert chat["choices"][0]["message"]["content"] == GREETING
        text = model({"prompt": "Once", "max_tokens": 5})
        assert text["choices"][0]["text"] == "Hello"

    @pytest.mark.parametrize(
        "bare",
        [{}, {"Records": []}, {"prompt": "x", "stream": True}, {"messages": []}, {"prompt": "x", "zzz": 1}],
    )
    def test_bare_bodies_that_make_no_sense(self, model: FunctionUrl, bare: dict[str, Any]) -> None:
        assert model(bare)["error"]["type"] == "invalid_request_error"

    @pytest.mark.parametrize("odd", [None, [], "text", 5])
    def test_events_that_are_no_objects(self, model: FunctionUrl, odd: Any) -> None:
        assert model(odd)["statusCode"] == 400
