"""What is not done is refused by name; what changes nothing is let through; nothing makes the server fail."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handler.app import create_app
from handler.platforms.function_url import FunctionUrl
from handler.settings import ServerSettings
from runtime.catalogue import ModelSpec
from runtime.protocol import EngineConfig
from tests.handler.conftest import GREETING, Server
from tests.handler.fake_engine import FakeEngine

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
LATER: dict[str, Any] = {
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "guided_decoding_backend": "outlines",
    "guided_whitespace_pattern": " *",
    "audio": {"voice": "alloy", "format": "mp3"},
    "modalities": ["text", "audio"],
    "prediction": {"type": "content", "content": "x"},
    "web_search_options": {},
    "reasoning_effort": "high",
    "verbosity": "low",
    "service_tier": "priority",
    "chat_template": "{{ messages }}",
    "chat_template_kwargs": {"enable_thinking": False},
    "documents": [{"text": "x"}],
    "mm_processor_kwargs": {"x": 1},
    "logits_processors": ["x"],
    "use_beam_search": True,
    "length_penalty": 1.5,
    "spaces_between_special_tokens": False,
    "echo": True,
    "kv_transfer_params": {},
}
WITHOUT_EFFECT: dict[str, Any] = {
    "user": "u",
    "metadata": {"k": "v"},
    "store": True,
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "service_tier": "auto",
    "parallel_tool_calls": True,
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "reasoning_effort": "none",
    "chat_template_kwargs": {},
    "use_beam_search": False,
    "length_penalty": 1.0,
    "priority": 0,
    "best_of": 1,
    "echo": False,
    "stop": [],
    "logit_bias": {},
}
WRONG: list[tuple[str, Any]] = [
    ("temperature", 2.5),
    ("temperature", "hot"),
    ("temperature", True),
    ("top_p", -0.1),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", 1.1),
    ("n", 0),
    ("n", 129),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", "5"),
    ("max_completion_tokens", 0),
    ("presence_penalty", 3),
    ("frequency_penalty", -3),
    ("repetition_penalty", 0),
    ("seed", 1 << 63),
    ("seed", 1 << 200),
    ("stop", ""),
    ("stop", ["x"] * 65),
    ("stop", 5),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [264]),
    ("logit_bias", {"264": 1}),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"1": 101}),
    ("top_logprobs", 3),
    ("prompt_logprobs", 21),
    ("stream_options", {"include_usage": True}),
    ("cache_salt", "with space"),
    ("min_tokens", 1 << 40),
    ("messages", []),
    ("messages", "Hi"),
]


@pytest.mark.parametrize("name", LATER)
def test_what_is_not_supported_is_refused_by_name(server: Server, name: str) -> None:
    reply = server.chat(**{name: LATER[name]})
    assert reply.status == 400
    assert reply.error["type"] == "invalid_request_error"
    assert reply.error["param"] == name
    assert name in reply.error["message"]
    assert server.engine.submitted == []


@pytest.mark.parametrize("name", LATER)
def test_null_asks_for_nothing(server: Server, name: str) -> None:
    assert server.chat(**{name: None}).status == 200


def test_nulls_of_fields_that_only_libraries_know_ask_for_nothing(server: Server) -> None:
    """As when an answer's `model_dump()` goes back into the conversation."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}", "parsed": None}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi", "tool_calls": None, "id": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "namespace": None},
        {"role": "tool", "content": "1", "tool_call_id": "c", "namespace": None, "status": None},
    ] * 3
    assert server.post("/v1/chat/completions", {"messages": turns}).status == 200
    turns[1]["namespace"] = "x"
    refused = server.post("/v1/chat/completions", {"messages": turns})
    assert (refused.status, refused.error["param"]) == (400, "messages.1.namespace")
    many = {"role": "user", "content": "Hi", **{f"x{number}": None for number in range(200)}}
    assert server.post("/v1/chat/completions", {"messages": [many] * 3}).status == 200


def test_what_changes_nothing_is_let_through(server: Server) -> None:
    assert server.chat(**WITHOUT_EFFECT).json["choices"][0]["message"]["content"] == GREETING


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_values_out_of_range_are_refused_by_name(server: Server, name: str, value: Any) -> None:
    reply = server.chat(**{name: value})
    assert reply.status == 400
    assert reply.error["param"].split(".")[0] == name
    assert server.engine.submitted == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"bad_words": [""]}, "bad_words"),
        ({"tools": []}, "tools"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [264]}, "prompt"),
        ({"prompt": [1 << 40]}, "prompt"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt": ["a"] * 16, "n": 128}, "n"),
    ],
)
def test_completions_refuse_by_name(server: Server, fields: dict[str, Any], param: str) -> None:
    reply = server.complete(**{"prompt": "x", **fields})
    assert reply.status == 400
    assert reply.error["param"].split(".")[0] == param


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "robot", "content": "x"}, "messages.0.role"),
        ({"content": "x"}, "messages.0.role"),
        ({"role": "tool", "content": "x"}, "messages.0.tool_call_id"),
        ({"role": "user", "content": "x", "tool_calls": []}, "messages.0.tool_calls"),
        ({"role": "assistant", "content": None}, "messages.0.content"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "messages.0.content"),
        ({"role": "user"}, "messages.0.content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages.0.content.0.type"),
        ({"role": "user", "content": "x", "colour": "red"}, "messages.0.colour"),
        (
            {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]},
            "messages.0.tool_calls.0.function",
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "["}}]},
            "messages.0.tool_calls.0.function.arguments",
        ),
    ],
)
def test_messages_are_checked_to_the_depth(server: Server, message: dict[str, Any], param: str) -> None:
    reply = server.post("/v1/chat/completions", {"messages": [message]})
    assert reply.status == 400
    assert reply.error["param"] == param


def test_images_are_told_that_there_is_text_alone(server: Server) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}]
    reply = server.post("/v1/chat/completions", {"messages": messages})
    assert (reply.status, reply.error["param"]) == (400, "messages.0.content.1.type")
    assert "takes text alone, no 'image_url'" in reply.error["message"]


def test_missing_and_unknown_fields(server: Server) -> None:
    missing = server.post("/v1/chat/completions", {"model": "tiny"})
    assert (missing.status, missing.error["param"]) == (400, "messages")
    assert missing.error["code"] == "missing_required_parameter"
    for name, meant in (
        ("temprature", "temperature"),
        ("repeat_penalty", "repetition_penalty"),
        ("max_new_tokens", "max_tokens"),
        ("enable_thinking", "chat_template_kwargs"),
    ):
        assert f"Did you mean '{meant}'?" in server.chat(**{name: 1}).error["message"]
    assert server.chat(colour="red").error["message"] == "Unknown field 'colour'."
    unknown = server.chat(temprature=1)
    assert (unknown.status, unknown.error["param"], unknown.error["code"]) == (
        400,
        "temprature",
        "unknown_parameter",
    )


def test_a_context_that_is_too_long_is_refused_with_the_numbers(server: Server) -> None:
    reply = server.complete("x" * 500, max_tokens=100)
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    for figure in ("512", "600", "500", "100"):
        assert figure in reply.error["message"]
    assert reply.error["param"] == "max_tokens"
    # What nobody asked for gives way instead.
    assert server.complete("x" * 500, max_tokens=None).status == 200
    assert server.engine.submitted.pop().sampling.max_tokens == 12
    assert server.chat(max_completion_tokens=5000).error["param"] == "max_completion_tokens"
    for long, param in (
        (server.complete("x" * 600, max_tokens=1), "prompt"),
        (server.chat("x" * 600, max_tokens=1), "messages"),
        (server.chat("x" * 600), "messages"),
    ):
        assert (long.error["code"], long.error["param"]) == ("context_length_exceeded", param)
    assert server.engine.submitted == []


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"stop": ["x"] * 65}, "stop", "at most 64 items"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": [[]]}, "prompt.0", "at least 1 item"),
        ({"prompt": ["x"] * 1025}, "prompt", "at most 1024 items"),
        ({"prompt": ["a", 1]}, "prompt.1", "valid string"),
        ({"prompt": [1, -1]}, "prompt.1", "greater than or equal to 0"),
    ],
)
def test_of_a_field_of_several_kinds_the_one_that_was_meant_is_spoken_of(
    server: Server, fields: dict[str, Any], param: str, said: str
) -> None:
    error = server.post("/v1/completions", {"prompt": "x", **fields}).error
    assert error["param"] == param
    assert said in error["message"]


def test_a_template_that_refuses_speaks_for_itself(make_server: Callable[..., Server]) -> None:
    server = make_server(chat_template="{{ raise_exception('System role not supported') }}")
    reply = server.chat()
    assert (reply.status, reply.error["param"]) == (400, "messages")
    assert "System role not supported" in reply.error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000, b'{"a":' * 5000]
)
def test_bodies_that_are_no_request(server: Server, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        reply = server.post(path, body)
        assert reply.status == 400
        assert reply.error["message"]


def test_what_is_no_http(server: Server) -> None:
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock,
        sock.makefile("rb") as answer,
    ):
        sock.sendall(b"GET / HTTP/1.1\r\nno header\r\n\r\n")
        head, _, body = answer.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "invalid_http"


def test_deep_nesting_is_refused_whatever_it_means(server: Server) -> None:
    deep: Any = "x"
    for _ in range(40):
        deep = [deep]
    assert "nested" in server.chat(metadata=deep).error["message"]


@pytest.fixture(scope="module")
def doors(tiny_model: Path) -> Iterator[FunctionUrl]:
    """The application without a socket: quick enough for thousands of requests."""
    config = EngineConfig(
        model=ModelSpec(id="tiny", source="/nowhere"), cache_dir="/nowhere", max_model_len=512
    )
    engine = FakeEngine(tiny_model, lambda submit: "ok", config)
    chosen = ServerSettings(engine=config, served_model_names=("tiny",))
    function = FunctionUrl(create_app(engine, chosen))  # type: ignore[arg-type]  # the client's interface
    yield function
    function.close()


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
plausible = {
    "messages": st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "system", "assistant", "tool", "developer"])},
            optional={"content": st.text(max_size=30) | json_values, "name": st.text(max_size=5)},
        ),
        max_size=3,
    ),
    "prompt": st.text(max_size=30)
    | st.lists(st.integers(0, 300), max_size=5)
    | st.lists(st.text(max_size=5), max_size=3),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 100),
    "n": st.integers(1, 3),
    "max_tokens": st.integers(0, 40),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
    "stream": st.booleans(),
    "logprobs": st.booleans() | st.integers(0, 5),
    "top_logprobs": st.integers(0, 5),
    "echo": st.booleans(),
    "seed": st.integers(-(2**70), 2**70),
    "logit_bias": st.dictionaries(st.integers(0, 300).map(str), st.floats(-100, 100), max_size=3),
    "prompt_logprobs": st.integers(0, 3),
    "stop_token_ids": st.lists(st.integers(0, 300), max_size=3),
    "continue_final_message": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
}
some_fields = st.fixed_dictionaries(
    {}, optional={name: value | json_values for name, value in plausible.items()}
)


class TestAnyBody:
    @given(
        st.sampled_from(["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]), some_fields
    )
    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
    def test_is_answered_or_refused_but_never_breaks_anything(
        self, doors: FunctionUrl, path: str, body: dict[str, Any]
    ) -> None:
        event = {
            "rawPath": path,
            "headers": {"content-type": "application/json"},
            "requestContext": {"http": {"method": "POST", "path": path}},
            "body": json.dumps(body),
        }
        answer = doors(event)
        assert answer["statusCode"] in (200, 400), answer
        if answer["statusCode"] == 400:
            error = json.loads(answer["body"])["error"]
            assert error["message"]
            assert set(error) == {"message", "type", "param", "code"}
        elif answer["headers"]["content-type"].startswith("text/event-stream"):
            assert answer["body"].endswith("data: [DONE]\n\n")
            assert '"error"' not in answer["body"]
