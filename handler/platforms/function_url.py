"""AWS Lambda function URLs, payload format 2.0: one event in, one whole answer out, the same application.

The application and the engine live as long as the execution environment does, on an event loop in a
thread of their own; every call hands its event over and waits. An event that is no HTTP request but an
OpenAI body as it stands (direct invocation) is answered too.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Scope

from handler.openai.errors import ApiError

# What Lambda takes back from a function in one piece, less some room for what stands around the body.
MAX_ANSWER_BYTES = 6 * 1024 * 1024 - 16_384
_START_SECONDS = 60.0


class FunctionUrl:
    """An application that answers events. Safe to call from several threads.

    `api_key` is sent along with bare bodies: whoever may invoke the function directly needs no key.
    """

    def __init__(self, app: ASGIApp, api_key: str | None = None) -> None:
        self._app = app
        self._api_key = api_key
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="firstlight", daemon=True).start()
        self._lifespan = _Lifespan(app)
        asyncio.run_coroutine_threadsafe(self._lifespan.start(), self._loop).result(_START_SECONDS)

    def __call__(self, event: Any) -> dict[str, Any]:
        """The answer to one event, as Lambda sends it on."""
        return asyncio.run_coroutine_threadsafe(self._answer(event), self._loop).result()

    def close(self) -> None:
        """Shut the application down and end the thread."""
        asyncio.run_coroutine_threadsafe(self._lifespan.stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _answer(self, event: Any) -> dict[str, Any]:
        if not isinstance(event, dict):
            return _refuse(ApiError(400, "The event is no JSON object.", code="invalid_event"))
        bare = "http" not in (event.get("requestContext") or {})
        try:
            scope, body = self._bare_request(event) if bare else _http_request(event)
        except ApiError as error:
            return error.body() if bare else _refuse(error)
        answer = await _call(self._app, scope, body)
        if bare:
            parsed: dict[str, Any] = json.loads(answer.body)
            return parsed
        return answer.as_event()

    def _bare_request(self, event: dict[str, Any]) -> tuple[Scope, bytes]:
        """The request that a bare OpenAI body stands for."""
        if "messages" in event:
            path = "/v1/chat/completions"
        elif "prompt" in event:
            path = "/v1/completions"
        else:
            message = "The event is neither an HTTP request nor an OpenAI body with 'messages' or 'prompt'."
            raise ApiError(400, message, code="invalid_event")
        if event.get("stream"):
            message = "'stream' is not available here: the answer is returned in one piece."
            raise ApiError(400, message, param="stream", code="unsupported_value")
        headers = [(b"content-type", b"application/json")]
        if self._api_key is not None:
            headers.append((b"authorization", b"Bearer " + self._api_key.encode()))
        return _scope("POST", path, headers), json.dumps(event).encode()


class _Lifespan:
    """Runs the application's lifespan: start-up at once, shutdown when asked."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._outbox: asyncio.Queue[Message] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run())
        await self._exchange("lifespan.startup")

    async def stop(self) -> None:
        await self._exchange("lifespan.shutdown")

    async def _run(self) -> None:
        scope: Scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        await self._app(scope, self._inbox.get, self._outbox.put)

    async def _exchange(self, kind: str) -> None:
        self._inbox.put_nowait({"type": kind})
        reply = await self._outbox.get()
        if reply["type"].endswith("failed"):
            raise RuntimeError(reply.get("message", kind))


class _Answer:
    """Collects what the application sends."""

    def __init__(self) -> None:
        self.status = 500
        self.headers: list[tuple[str, str]] = []
        self.body = bytearray()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in message["headers"]]
        elif message["type"] == "http.response.body":
            self.body += message.get("body", b"")

    def as_event(self) -> dict[str, Any]:
        """The answer in payload format 2.0: cookies apart, other repeated headers joined, bytes in base64."""
        headers: dict[str, str] = {}
        for name, value in self.headers:
            if name != "set-cookie":
                headers[name] = f"{headers[name]}, {value}" if name in headers else value
        text = _as_text(bytes(self.body), headers.get("content-type", ""))
        binary = text is None
        body = base64.b64encode(self.body).decode() if text is None else text
        # Lambda counts the answer as the JSON document that it is in the end.
        if len(json.dumps(body)) > MAX_ANSWER_BYTES:
            message = "The answer is larger than the 6 MB that Lambda passes on; ask for less, or stream it."
            return _refuse(ApiError(413, message, code="answer_too_large"))
        answer = {
            "statusCode": self.status,
            "headers": headers,
            "body": body,
            "isBase64Encoded": binary,
        }
        cookies = [value for name, value in self.headers if name == "set-cookie"]
        return answer | {"cookies": cookies} if cookies else answer


def _as_text(body: bytes, content_type: str) -> str | None:
    if not content_type.startswith(("text/", "application/json", "application/javascript")):
        return None if body else ""
    with contextlib.suppress(UnicodeDecodeError):
        return body.decode()
    return None


def _refuse(error: ApiError) -> dict[str, Any]:
    headers = {"content-type": "application/json", **error.headers}
    return {
        "statusCode": error.status,
        "headers": headers,
        "body": error.encoded().decode(),
        "isBase64Encoded": False,
    }


async def _call(app: ASGIApp, scope: Scope, body: bytes) -> _Answer:
    answer = _Answer()
    messages = _incoming(body)
    await app(scope, messages.__anext__, answer.send)
    return answer


async def _incoming(body: bytes) -> AsyncIterator[Message]:
    yield {"type": "http.request", "body": body, "more_body": False}
    await asyncio.Event().wait()  # Lambda does not tell whether the client is still there


def _http_request(event: dict[str, Any]) -> tuple[Scope, bytes]:
    context = event["requestContext"]
    http = context["http"]
    headers = [
        (str(name).lower().encode("latin-1", "replace"), str(value).encode("latin-1", "replace"))
        for name, value in (event.get("headers") or {}).items()
    ]
    cookies = event.get("cookies") or []
    if cookies:
        headers.append((b"cookie", "; ".join(map(str, cookies)).encode("latin-1", "replace")))
    raw_path = str(event.get("rawPath") or http.get("path") or "/")
    scope = _scope(str(http.get("method", "GET")).upper(), raw_path, headers)
    scope["query_string"] = str(event.get("rawQueryString") or "").encode("latin-1", "replace")
    # The address that Lambda saw; x-forwarded-for says whatever the client likes.
    scope["client"] = (str(http.get("sourceIp", "")), 0)
    scope["server"] = (str(context.get("domainName", "lambda")), 443)
    return scope, _body(event)


def _body(event: dict[str, Any]) -> bytes:
    body = event.get("body") or ""
    if not event.get("isBase64Encoded"):
        return str(body).encode("utf-8", "surrogatepass")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise ApiError(400, "The event's body is not valid base64.", code="invalid_event") from None


def _scope(method: str, raw_path: str, headers: list[tuple[bytes, bytes]]) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "https",
        "path": unquote(raw_path),
        "raw_path": raw_path.encode("latin-1", "replace"),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 0),
        "server": ("lambda", 443),
        "state": {},
    }


_function: FunctionUrl | None = None
_lock = threading.Lock()


def handle(event: Any, context: object) -> dict[str, Any]:
    """Answer one event. The first call reads the settings from the environment and starts the engine."""
    global _function
    with _lock:
        if _function is None:
            _function = _from_environment()
    return _function(event)


def _from_environment() -> FunctionUrl:
    from handler.settings import read_others, read_settings
    from runtime.client import EngineClient

    settings, others = read_settings({}), read_others({})
    client = EngineClient(settings.engine)
    client.spawn()

    from handler.app import create_app

    return FunctionUrl(create_app(client, settings, others=others), next(iter(settings.api_keys), None))
