"""Requests of people who serve these models already, from their guides, and what they read in answers.

One guide sends curl to an endpoint of vLLM's server, one uses OpenAI's client with models behind swift.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.handler.conftest import GREETING, Server, starter

QWEN = "/model/Qwen-14B-Chat"
GEMMA = "google/gemma-2-27b-it"
SWIFT = "qwen-7b-chat"
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
SERIES = {"role": "user", "content": "Who won the world series in 2020?"}
# Of the last answer in the guide: types, where values differ from model to model.
ANSWER: dict[str, Any] = {
    "id": str,
    "object": "chat.completion",
    "created": int,
    "model": str,
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "reasoning_content": None,
                "content": GREETING,
                "tool_calls": [],
            },
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ],
    "usage": {"prompt_tokens": int, "total_tokens": int, "completion_tokens": int},
    "prompt_logprobs": None,
}
GEMMA_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\\n' + m['content'] }}{% endfor %}"
)


def holds(found: Any, expected: Any) -> bool:
    """Whether all that is expected is there; more may be."""
    if isinstance(expected, type):
        return type(found) is expected
    if isinstance(expected, dict):
        return all(name in found and holds(found[name], value) for name, value in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(holds, found, expected))
    return bool(found == expected)


@pytest.fixture(scope="module")
def endpoint(tiny_model: Path) -> Iterator[Server]:
    with starter(tiny_model) as make:
        yield make(served_model_names=(SWIFT, QWEN, GEMMA))


class TestCurl:
    @pytest.mark.parametrize(
        "body",
        [
            {"model": QWEN, "messages": [SYSTEM, SERIES], "max_tokens": 200},
            {"model": QWEN, "messages": [SYSTEM, SERIES], "max_tokens": 200, "top_k": 1},
            {"model": GEMMA, "messages": [SERIES], "max_tokens": 200},
            {
                "model": SWIFT,
                "messages": [{"role": "user", "content": "What to do if I can't fall asleep at night?"}],
                "max_tokens": 256,
                "temperature": 0,
            },
        ],
    )
    def test_a_conversation(self, endpoint: Server, body: dict[str, Any]) -> None:
        answer = endpoint.post("/v1/chat/completions", body).json
        assert holds(answer, ANSWER), answer
        assert answer["model"] == body["model"]
        assert answer["id"].startswith("chatcmpl-")
        usage = answer["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert "prompt_tokens_details" in usage

    def test_a_prompt(self, endpoint: Server) -> None:
        prompt = "Zhejiang -> Hangzhou\nAnhui -> Hefei\nSichuan ->"
        body = {"model": SWIFT, "prompt": prompt, "max_tokens": 32, "temperature": 0.1, "seed": 42}
        answer = endpoint.post("/v1/completions", body).json
        choice = {"index": 0, "text": GREETING, "logprobs": None, "finish_reason": "stop"}
        expected = {"id": str, "object": "text_completion", "created": int, "choices": [choice]}
        assert holds(answer, {**expected, "model": SWIFT, "usage": ANSWER["usage"]}), answer

    def test_what_is_said_of_a_system_message_where_there_can_be_none(
        self, make_server: Callable[..., Server]
    ) -> None:
        server = make_server(served_model_names=(GEMMA,), chat_template=GEMMA_TEMPLATE)
        body = {"model": GEMMA, "messages": [SYSTEM, SERIES], "max_tokens": 200}
        refused = server.post("/v1/chat/completions", body)
        assert (refused.status, refused.error["param"]) == (400, "messages")
        assert "System role not supported" in refused.error["message"]
        assert server.post("/v1/chat/completions", body | {"messages": [SERIES]}).status == 200


class TestOpenAI:
    @pytest.fixture
    def client(self, endpoint: Server) -> openai.OpenAI:
        return openai.OpenAI(api_key="EMPTY", base_url=f"{endpoint.url}/v1")

    def test_a_conversation_that_goes_on_streamed(self, client: openai.OpenAI) -> None:
        model = client.models.list().data[0].id
        assert model == SWIFT
        messages: list[Any] = [{"role": "user", "content": "Where is the capital of Zhejiang?"}]
        answer = client.chat.completions.create(model=model, messages=messages, seed=42)
        assert answer.choices[0].message.content == GREETING
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        messages.append({"role": "user", "content": "What delicious food is there?"})
        stream = client.chat.completions.create(model=model, messages=messages, stream=True, seed=42)
        # The guide prints the content of every chunk as it is.
        assert "".join(f"{chunk.choices[0].delta.content}" for chunk in stream) == GREETING

    def test_a_prompt_streamed(self, client: openai.OpenAI) -> None:
        prompt = "Zhejiang -> Hangzhou\nAnhui -> Hefei\nSichuan ->"
        asked: dict[str, Any] = {"prompt": prompt, "seed": 42, "temperature": 0.1, "max_tokens": 32}
        assert client.completions.create(model=SWIFT, **asked).choices[0].text == GREETING
        stream = client.completions.create(model=SWIFT, stream=True, **asked)
        assert "".join(f"{chunk.choices[0].text}" for chunk in stream) == GREETING

    def test_five_at_once(self, endpoint: Server) -> None:
        async def ask() -> list[str | None]:
            async with openai.AsyncOpenAI(api_key="EMPTY", base_url=f"{endpoint.url}/v1") as client:
                question: Any = [{"role": "user", "content": "Where is the capital of Zhejiang?"}]
                asked = [
                    client.chat.completions.create(model=SWIFT, messages=question, seed=42) for _ in range(5)
                ]
                return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

        assert asyncio.run(ask()) == [GREETING] * 5

    def test_every_name_is_listed_and_answers_to_itself(self, client: openai.OpenAI) -> None:
        names = [model.id for model in client.models.list().data]
        assert names == [SWIFT, QWEN, GEMMA]
        question: Any = [{"role": "user", "content": "who are you?"}]
        for name in names:
            answer = client.chat.completions.create(model=name, messages=question, seed=42)
            assert answer.model == name
            assert json.loads(answer.to_json())["choices"][0]["message"]["content"] == GREETING
