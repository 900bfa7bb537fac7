"""OpenAI's Responses API through OpenAI's own client: texts, calls, reasoning, events, refusals."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import msgspec
import openai
import pytest

from runtime.protocol import Submit, TokenDelta
from tests.handler.conftest import GREETING, MODEL, Server
from tests.handler.fake_engine import READY, FakeEngine
from tests.runtime.text.templates import CHATML

TOOL: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
REPLY = (
    "<think>\nLet me see.\n</think>\n\nI look.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Berlin"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
)
Make = Callable[..., Server]


def prepared(engine: FakeEngine) -> None:
    engine.info = msgspec.structs.replace(READY, max_model_len=4096)


@pytest.fixture
def make_server(make_server: Make) -> Make:
    return functools.partial(make_server, prepare=prepared)


@pytest.fixture
def agent(make_server: Make) -> Server:
    """A model that reasons, speaks and calls."""
    return make_server(REPLY, chat_template=CHATML)


def client_of(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0).responses


def prompt(server: Server) -> str:
    ids = server.engine.submitted[-1].prompt_token_ids
    return server.engine.tokenizer.decode(ids, skip_special_tokens=False)


def respond(server: Server, **fields: Any) -> Any:
    return server.post("/v1/responses", {"input": "Hi", **fields})


def test_text(server: Server) -> None:
    response = client_of(server).create(
        model=MODEL, input="Hi", instructions="Be brief.", temperature=0.5, metadata={"k": "v"}
    )
    assert response.output_text == GREETING
    assert (response.status, response.error, response.object) == ("completed", None, "response")
    assert (response.model, response.temperature, response.metadata) == (MODEL, 0.5, {"k": "v"})
    (message,) = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert response.usage.output_tokens == len(GREETING) + 1
    assert response.usage.input_tokens == len(server.engine.submitted[-1].prompt_token_ids)
    assert response.usage.input_tokens_details.cached_tokens == 16
    assert prompt(server) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_text_streamed(server: Server) -> None:
    with client_of(server).stream(model=MODEL, input="Hi") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == GREETING
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == GREETING
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].response.status == "in_progress"
    assert events[0].response.output == []


def test_the_stream_on_the_wire(server: Server) -> None:
    reply = respond(server, stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    blocks = reply.body.decode().strip().split("\n\n")
    for block in blocks:
        head, data = block.split("\n")
        assert head == f"event: {json.loads(data.removeprefix('data: '))['type']}"
    assert json.loads(blocks[-1].partition("data: ")[2])["response"]["status"] == "completed"


class TestItems:
    def test_reasoning_text_and_calls(self, agent: Server) -> None:
        response = client_of(agent).create(model=MODEL, input="Weather?", tools=[TOOL])
        reasoning, message, first, second = response.output
        assert [item.type for item in response.output] == [
            *("reasoning", "message", "function_call", "function_call")
        ]
        assert reasoning.content[0].text == "Let me see."
        assert message.content[0].text == "I look."
        assert (first.name, json.loads(first.arguments)) == ("weather", {"city": "Berlin"})
        assert second.arguments == "{}"
        assert first.call_id != second.call_id
        assert len({item.id for item in response.output}) == 4
        tokens = response.usage.output_tokens_details.reasoning_tokens
        assert len("Let me see.") <= tokens <= len("<think>\nLet me see.\n</think>")

    def test_streamed_they_are_the_same(self, agent: Server) -> None:
        with client_of(agent).stream(model=MODEL, input="Weather?", tools=[TOOL]) as stream:
            events = list(stream)
            final = stream.get_final_response()
        whole = client_of(agent).create(model=MODEL, input="Weather?", tools=[TOOL])
        texts = [
            [getattr(i, "arguments", None) or i.content[0].text for i in r.output] for r in (final, whole)
        ]
        assert texts[0] == texts[1]
        arguments = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
        assert "".join(arguments) == '{"city": "Berlin"}{}'
        assert len(arguments) > 5
        opened = [e.item.id for e in events if e.type == "response.output_item.added"]
        closed = [e.item.id for e in events if e.type == "response.output_item.done"]
        assert opened == closed == [item.id for item in final.output]

    def test_come_back_as_one_turn(self, agent: Server) -> None:
        client = client_of(agent)
        response = client.create(model=MODEL, input="Weather?", tools=[TOOL])
        history: list[Any] = [{"role": "user", "content": "Weather?"}, *response.output]
        calls = [item for item in response.output if item.type == "function_call"]
        history += [
            {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."} for call in calls
        ]
        client.create(model=MODEL, input=history, tools=[TOOL])
        text = prompt(agent)
        assert text.count("<|im_start|>assistant\n") == 2, "the answer's turn and the one to come"
        assert text.count("<tool_call>") == 2
        assert text.count("<|im_start|>tool\nSunny.<|im_end|>") == 2

    def test_parts_and_roles(self, server: Server) -> None:
        parts = [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]
        given = [
            {"type": "message", "role": "developer", "content": "Be brief."},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "output_text", "text": "three", "annotations": []}]},
        ]
        assert respond(server, input=given).status == 200
        assert prompt(server).startswith(
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
            "<|im_start|>assistant\nthree<|im_end|>\n"
        )


def test_cut_off(server: Server) -> None:
    response = client_of(server).create(model=MODEL, input="Hi", max_output_tokens=5)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (response.output_text, response.output[0].status) == ("Hello", "incomplete")
    events = list(client_of(server).create(model=MODEL, input="Hi", max_output_tokens=5, stream=True))
    assert events[-1].type == "response.incomplete"


def test_log_probabilities(server: Server) -> None:
    fields: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    response = client_of(server).create(model=MODEL, input="Hi", **fields)
    scores = response.output[0].content[0].logprobs
    assert "".join(entry.token for entry in scores) == GREETING
    assert scores[0].top_logprobs[0].token == "H"
    events = client_of(server).create(model=MODEL, input="Hi", stream=True, **fields)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [len(event.logprobs) for event in deltas] == [len(event.delta) for event in deltas]


def test_an_engine_that_dies_ends_the_stream(make_server: Make) -> None:
    def reply(submit: Submit) -> list[TokenDelta]:
        ids = server.engine.tokenizer.encode("Hel")
        error = TokenDelta(request_id=submit.request_id, finish_reason="error", error="Out of blocks.")
        return [TokenDelta(request_id=submit.request_id, token_ids=ids), error]

    server = make_server(reply)
    *_, told, failed = list(client_of(server).create(model=MODEL, input="Hi", stream=True))
    assert (told.type, told.message) == ("error", "Out of blocks.")
    assert (failed.type, failed.response.status) == ("response.failed", "failed")
    assert failed.response.error.message == "Out of blocks."
    assert respond(server).status == 500


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["computer_call_output.output.image_url"]}, "include.0"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"input": []}, "input"),
        ({"input": [{"type": "computer_call", "id": "x"}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": "Hi"}, {"type": "item_reference", "id": "x"}]}, "input.1"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f"}]}, "input.0.arguments"),
        (
            {"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "x"}]},
            "input.0.arguments",
        ),
        ({"stream_options": {}}, "stream_options"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
    ],
)
def test_what_cannot_be_is_refused_by_name(server: Server, fields: dict[str, Any], param: str) -> None:
    reply = respond(server, **fields)
    assert (reply.status, reply.error["param"]) == (400, param)
    assert server.engine.submitted == []


def test_what_changes_nothing_is_let_through(server: Server) -> None:
    fields = {"store": False, "truncation": "disabled", "background": False, "user": "u", "tools": []}
    text = {"format": {"type": "text"}, "verbosity": "medium"}
    assert respond(server, **fields, text=text, include=[], previous_response_id=None).status == 200


def test_what_agents_send_with_every_request(agent: Server) -> None:
    """Nothing is kept, and the answer says so; reasoning is handed out in the plain, and taken back so."""
    sent: dict[str, Any] = {
        "store": True,
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": None, "summary": "auto"},
        "prompt_cache_key": "k",
        "parallel_tool_calls": False,
        "tools": [TOOL],
    }
    client = client_of(agent)
    first = client.create(model=MODEL, input="Hi", **sent)
    assert first.store is False
    reasoning = first.output[0]
    assert (reasoning.type, reasoning.encrypted_content) == ("reasoning", None)
    assert first.output[1].content[0].logprobs in (None, [])
    again = [{"role": "user", "content": "Hi"}, *(item.model_dump() for item in first.output)]
    client.create(model=MODEL, input=[*again, {"role": "user", "content": "And now?"}], **sent)
    assert "Let me see." in reasoning.content[0].text
    assert '"Berlin"' in prompt(agent)


def test_what_is_not_kept_cannot_be_referred_to(server: Server) -> None:
    reply = respond(server, input=[{"type": "item_reference", "id": "msg_1"}])
    assert "'msg_1' of an earlier response" in reply.error["message"]
    assert "'store': false" in reply.error["message"]


def test_embeddings_are_declined_clearly(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
        client.embeddings.create(model=MODEL, input="x")
