"""Answers as OpenAI's client hands them out go back into the next request, in every form that it has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import msgspec
import openai
import pytest
from pydantic import BaseModel

from tests.handler.conftest import MODEL, Server
from tests.handler.fake_engine import READY, FakeEngine
from tests.runtime.text.templates import CHATML

CALL = 'I look.\n<tool_call>\n{"name": "Weather", "arguments": {"city": "Berlin"}}\n</tool_call>'
QUESTION: Any = {"role": "user", "content": "Hi"}
FORMS: list[Callable[[Any], Any]] = [
    lambda item: item,
    lambda item: item.model_dump(),
    lambda item: item.to_dict(),
    lambda item: item.model_dump(exclude_none=True),
]
Make = Callable[..., Server]


class Weather(BaseModel):
    """The weather somewhere."""

    city: str


def prepared(engine: FakeEngine) -> None:
    engine.info = msgspec.structs.replace(READY, max_model_len=4096)


@pytest.fixture
def client_saying(make_server: Make) -> Callable[[str], openai.OpenAI]:
    make = functools.partial(make_server, prepare=prepared, chat_template=CHATML)

    def client(reply: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{make(reply).url}/v1", api_key="none", max_retries=0)

    return client


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("form", FORMS, ids=["object", "model_dump", "to_dict", "without nulls"])
class TestGoingBack:
    def test_a_parsed_message(self, client_saying: Any, form: Callable[[Any], Any]) -> None:
        chat = client_saying('{"city": "Berlin"}').chat.completions
        message = chat.parse(model=MODEL, messages=[QUESTION], response_format=Weather).choices[0].message
        assert message.parsed == Weather(city="Berlin")
        assert chat.create(model=MODEL, messages=[QUESTION, form(message), QUESTION]).choices

    def test_calls_with_parsed_arguments(self, client_saying: Any, form: Callable[[Any], Any]) -> None:
        chat = client_saying(CALL).chat.completions
        tools = [openai.pydantic_function_tool(Weather)]
        message = chat.parse(model=MODEL, messages=[QUESTION], tools=tools).choices[0].message
        (call,) = message.tool_calls
        assert call.function.parsed_arguments == Weather(city="Berlin")
        result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        assert chat.create(model=MODEL, messages=[QUESTION, form(message), result], tools=tools).choices

    def test_what_a_stream_added_up_to(self, client_saying: Any, form: Callable[[Any], Any]) -> None:
        chat = client_saying(CALL).chat.completions
        tools = [openai.pydantic_function_tool(Weather)]
        with chat.stream(model=MODEL, messages=[QUESTION], tools=tools) as stream:
            message = stream.get_final_completion().choices[0].message
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
        assert chat.create(model=MODEL, messages=[QUESTION, form(message), result], tools=tools).choices

    def test_the_items_of_a_response(self, client_saying: Any, form: Callable[[Any], Any]) -> None:
        responses = client_saying('{"city": "Berlin"}').responses
        parsed = responses.parse(model=MODEL, input="Hi", text_format=Weather)
        assert parsed.output_parsed == Weather(city="Berlin")
        items = [form(item) for item in parsed.output]
        assert responses.create(model=MODEL, input=[QUESTION, *items, QUESTION]).output_text

    def test_the_calls_of_a_response(self, client_saying: Any, form: Callable[[Any], Any]) -> None:
        responses = client_saying(CALL).responses
        tools = [openai.pydantic_function_tool(Weather)["function"] | {"type": "function"}]
        done = responses.parse(model=MODEL, input="Hi", tools=tools)
        (call,) = [item for item in done.output if item.type == "function_call"]
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        items = [form(item) for item in done.output]
        assert responses.create(model=MODEL, input=[QUESTION, *items, output], tools=tools).output
