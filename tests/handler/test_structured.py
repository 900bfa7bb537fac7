"""Structured outputs over HTTP, from a model that knows nothing: what it answers has the form asked for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ContentDoneEvent, FunctionToolCallArgumentsDoneEvent

from runtime.text.tokenizer import Tokenizer
from tests.conftest import CONFIG
from tests.handler.conftest import Server
from tests.handler.serving import Served, served

QUESTION: Any = [{"role": "user", "content": "Hi"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,4}$"},
        "count": {"type": "integer", "minimum": -5, "maximum": 300},
        "tags": {
            "type": "array",
            "items": {"enum": ["red", "gr\u00fcn", None]},
            "maxItems": 3,
            "uniqueItems": False,
        },
        "inner": {"$ref": "#/$defs/inner"},
    },
    "required": ["id", "count", "tags", "inner"],
    "additionalProperties": False,
    "$defs": {
        "inner": {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 5, "format": "password"}]}
    },
}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Bern", "Rome"]},
        "days": {"type": "integer", "maximum": 9, "minimum": 0},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}},
    {"type": "function", "function": {"name": "time"}},
]


# Enough for a compiler's stack.
CHAIN = "\n".join(["start: r0", *(f"r{n}: r{n + 1}" for n in range(3000)), 'r3000: "x"'])


class Event(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    kind: Literal["meeting", "party"]
    day: int = pydantic.Field(ge=1, le=31)
    people: list[Literal["Ann", "Bob"]] = pydantic.Field(max_length=3)


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with room for the words that tell it of tools."""
    directory = tmp_path_factory.mktemp("roomy") / "llama"
    shutil.copytree(tiny_model, directory)
    (directory / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 4096}))
    return directory


@pytest.fixture(scope="module")
def server_of_nonsense(model: Path) -> Iterator[Served]:
    with served("--model", str(model), "--served-model-name", "tiny", "--device", "cpu") as server:
        yield server


@pytest.fixture(scope="module")
def client(server_of_nonsense: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_of_nonsense.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def as_format(schema: dict[str, Any]) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


class TestOpenAiClient:
    def test_parse(self, client: openai.OpenAI) -> None:
        for seed in range(5):
            done = client.chat.completions.parse(
                model="tiny", messages=QUESTION, response_format=Event, temperature=2, seed=seed
            )
            assert done.choices[0].finish_reason == "stop"
            assert isinstance(done.choices[0].message.parsed, Event)

    def test_stream(self, client: openai.OpenAI) -> None:
        with client.chat.completions.stream(
            model="tiny", messages=QUESTION, response_format=Event, temperature=2, seed=1
        ) as stream:
            done = [event for event in stream if isinstance(event, ContentDoneEvent)]
        assert isinstance(done[0].parsed, Event)
        whole = client.chat.completions.parse(
            model="tiny", messages=QUESTION, response_format=Event, temperature=2, seed=1
        )
        assert whole.choices[0].message.parsed == done[0].parsed

    def test_tools_are_parsed(self, client: openai.OpenAI) -> None:
        tool = openai.pydantic_function_tool(Event, name="invite")
        done = client.chat.completions.parse(
            model="tiny", messages=QUESTION, tools=[tool], tool_choice="required", temperature=2, seed=3
        )
        calls = done.choices[0].message.tool_calls
        assert done.choices[0].finish_reason == "tool_calls"
        assert calls is not None
        assert all(isinstance(call.function.parsed_arguments, Event) for call in calls)

    def test_tools_are_streamed(self, client: openai.OpenAI) -> None:
        tool = openai.pydantic_function_tool(Event, name="invite")
        named: Any = {"type": "function", "function": {"name": "invite"}}
        with client.chat.completions.stream(
            model="tiny", messages=QUESTION, tools=[tool], tool_choice=named, temperature=2, seed=4
        ) as stream:
            done = [event for event in stream if isinstance(event, FunctionToolCallArgumentsDoneEvent)]
        assert len(done) == 1
        assert isinstance(done[0].parsed_arguments, Event)

    def test_responses(self, client: openai.OpenAI) -> None:
        for seed in range(3):
            extra = {"seed": seed}
            done = client.responses.parse(
                model="tiny", input="Hi", text_format=Event, temperature=2, store=False, extra_body=extra
            )
            assert done.status == "completed"
            assert isinstance(done.output_parsed, Event)
            assert done.text is not None
            assert done.text.format is not None
            assert done.text.format.type == "json_schema"

    def test_responses_call_what_they_must(self, client: openai.OpenAI) -> None:
        tool: Any = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}
        done = client.responses.create(
            model="tiny", input="Hi", tools=[tool], tool_choice="required", temperature=2, store=False
        )
        calls = [item for item in done.output if item.type == "function_call"]
        assert len(calls) == len(done.output) > 0
        for call in calls:
            jsonschema.validate(json.loads(call.arguments), WEATHER)


class TestForms:
    @pytest.mark.parametrize(
        ("fields", "pattern"),
        [
            ({"guided_regex": r"[ab]{3}/\d\n"}, r"[ab]{3}/\d\n"),
            ({"structured_outputs": {"regex": "^x{2,5}$"}}, "x{2,5}"),
            ({"guided_choice": ["yes", 'it\'s "no"\n', "\u00fc/\\"]}, 'yes|it\'s "no"\n|\u00fc/\\\\'),
            ({"structured_outputs": {"choice": ["a"]}}, "a"),
            ({"guided_grammar": 'root ::= ("ab" | "c") [0-9]'}, "(ab|c)[0-9]"),
            ({"structured_outputs": {"grammar": 'start: "x" /[yz]{2}/'}}, "x[yz]{2}"),
            ({"guided_json": json.dumps({"enum": [1, "a"]})}, '1|"a"'),
            ({"structured_outputs": {"json": {"type": "boolean"}}}, "true|false"),
        ],
    )
    def test_of_vllm(self, client: openai.OpenAI, fields: dict[str, Any], pattern: str) -> None:
        for seed in range(3):
            given: dict[str, Any] = {"model": "tiny", "temperature": 2, "seed": seed, "extra_body": fields}
            chat = client.chat.completions.create(messages=QUESTION, **given)
            text = client.completions.create(prompt="Hi", max_tokens=100, **given)
            assert re.fullmatch(pattern, chat.choices[0].message.content or "")
            assert re.fullmatch(pattern, text.choices[0].text)
            assert chat.choices[0].finish_reason == text.choices[0].finish_reason == "stop"

    def test_any_object(self, client: openai.OpenAI) -> None:
        wanted: Any = {"type": "json_object"}
        for seed in range(5):
            done = client.chat.completions.create(
                model="tiny", messages=QUESTION, response_format=wanted, temperature=0.5, seed=seed
            )
            text = done.choices[0].message.content or ""
            assert text.startswith("{")
            if done.choices[0].finish_reason == "stop":
                assert isinstance(json.loads(text), dict)

    def test_behind_half_a_character(self, client: openai.OpenAI, model: Path) -> None:
        tokenizer = Tokenizer.load(model)
        half = [index for index in range(256) if tokenizer.token_bytes(index) in (b"H", b"\xf0", b"\x9f")]
        done = client.completions.create(
            model="tiny", prompt=half, max_tokens=50, extra_body={"guided_choice": ["{}", "\u00e9"]}
        )
        assert done.choices[0].text in ("{}", "\u00e9")

    def test_what_is_cut_off_says_so(self, client: openai.OpenAI) -> None:
        done = client.chat.completions.create(
            model="tiny", messages=QUESTION, response_format=as_format(SCHEMA), max_tokens=9
        )
        assert done.choices[0].finish_reason == "length"
        assert done.usage is not None
        assert done.usage.completion_tokens == 9

    def test_beside_everything_else(self, client: openai.OpenAI) -> None:
        """Several choices, log probabilities, penalties, and a stop string in the middle of it."""
        given: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "temperature": 2, "seed": 7}
        done = client.chat.completions.create(
            **given,
            response_format=as_format(SCHEMA),
            n=4,
            logprobs=True,
            top_logprobs=2,
            frequency_penalty=1,
            logit_bias={"65": 5},
            extra_body={"top_k": 20, "min_tokens": 10, "repetition_penalty": 1.2},
        )
        texts = [choice.message.content or "" for choice in done.choices]
        assert len(set(texts)) == 4
        for choice, text in zip(done.choices, texts, strict=True):
            jsonschema.validate(json.loads(text), SCHEMA)
            assert choice.logprobs is not None
            assert b"".join(bytes(e.bytes or []) for e in choice.logprobs.content or []).decode() == text
        cut = client.chat.completions.create(**given, response_format=as_format(SCHEMA), stop='"count"')
        assert cut.choices[0].finish_reason == "stop"
        assert re.fullmatch(
            r'\{\s*"id"\s*:\s*"[A-Z]{2}-[0-9]{1,4}"\s*,\s*', cut.choices[0].message.content or ""
        )


def test_64_at_once_beside_others(client: openai.OpenAI) -> None:
    """Every one of them is valid, and those without a grammar say what they say when alone."""

    def held(seed: int) -> str:
        done = client.chat.completions.create(
            model="tiny", messages=QUESTION, response_format=as_format(SCHEMA), temperature=2, seed=seed
        )
        assert done.choices[0].finish_reason == "stop"
        return done.choices[0].message.content or ""

    def free(seed: int) -> list[int]:
        done = client.completions.create(
            model="tiny",
            prompt="Hi",
            max_tokens=40,
            temperature=1,
            seed=seed,
            extra_body={"return_token_ids": True},
        )
        token_ids: list[int] = done.choices[0].token_ids  # type: ignore[attr-defined]
        return token_ids

    alone = [free(seed) for seed in range(3)]
    with ThreadPoolExecutor(96) as pool:
        together = [pool.submit(held, seed) for seed in range(64)]
        others = [pool.submit(free, seed % 3) for seed in range(32)]
        texts = [future.result() for future in together]
        assert [future.result() for future in others] == [alone[seed % 3] for seed in range(32)]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert texts[5] == held(5)


class TestToolChoice:
    @pytest.mark.parametrize("parser", ["hermes", "mistral"])
    def test_in_the_models_own_format(self, model: Path, parser: str) -> None:
        with served("--model", str(model), "--device", "cpu", "--tool-call-parser", parser) as server:
            for seed, parallel in ((1, True), (2, False)):
                with server.post(
                    "/v1/chat/completions",
                    messages=QUESTION,
                    tools=TOOLS,
                    tool_choice="required",
                    parallel_tool_calls=parallel,
                    temperature=2,
                    seed=seed,
                ).getresponse() as response:
                    (choice,) = json.loads(response.read())["choices"]
                calls = choice["message"]["tool_calls"]
                assert choice["message"]["content"] is None
                assert len(calls) == 1 or parallel
                assert (choice["finish_reason"] == "tool_calls") == (choice["finish_reason"] != "length")
                for call in calls[: None if choice["finish_reason"] == "tool_calls" else -1]:
                    arguments = json.loads(call["function"]["arguments"])
                    jsonschema.validate(arguments, WEATHER if call["function"]["name"] == "weather" else {})

    def test_named(self, client: openai.OpenAI) -> None:
        for name in ("weather", "time"):
            done = client.chat.completions.create(
                model="tiny",
                messages=QUESTION,
                tools=TOOLS,
                tool_choice={"type": "function", "function": {"name": name}},
                temperature=2,
            )
            (call,) = done.choices[0].message.tool_calls or []
            assert call.type == "function"
            assert call.function.name == name
            arguments = json.loads(call.function.arguments)
            jsonschema.validate(arguments, WEATHER if name == "weather" else {"maxProperties": 0})


class TestRefused:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("fields", "param", "complaint"),
        [
            ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
            (
                {"response_format": as_format({"type": "objct"})},
                "response_format.json_schema.schema",
                "objct",
            ),
            ({"guided_grammar": "root ::= foo"}, "guided_grammar", "foo"),
            ({"guided_grammar": "root ::= (("}, "guided_grammar", "cannot be read"),
            ({"guided_grammar": CHAIN}, "guided_grammar", "nested too deeply"),
            ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json", "not"),
            (
                {
                    "tools": [
                        {
                            "type": "function",
                            "function": {"name": "f", "parameters": {"not": {}}, "strict": True},
                        }
                    ]
                },
                "tools",
                "not",
            ),
        ],
    )
    def test_a_form_that_cannot_be(
        self, client: openai.OpenAI, fields: dict[str, Any], param: str, complaint: str, stream: bool
    ) -> None:
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(model="tiny", messages=QUESTION, stream=stream, extra_body=fields)
        assert raised.value.param == param
        assert complaint in raised.value.message

    def test_nothing_is_left_to_say(self, client: openai.OpenAI) -> None:
        ban = {str(ord("a") - ord("!")): -100.0}
        with pytest.raises(openai.BadRequestError, match="rule out"):
            client.chat.completions.create(
                model="tiny",
                messages=QUESTION,
                logit_bias={},
                extra_body={"guided_choice": ["aa"], "bad_words": ["a"]},
            )
        done = client.chat.completions.create(
            model="tiny", messages=QUESTION, logit_bias=ban, extra_body={"guided_choice": ["aa"]}
        )
        assert done.choices[0].message.content == "aa"

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"response_format": {"type": "xml"}}, "response_format.type"),
            ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
            (
                {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
                "response_format.json_schema.schema",
            ),
            ({"structured_outputs": {}}, "structured_outputs"),
            ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
            ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
            ({"guided_regex": "a" * 70_000}, "guided_regex"),
            ({"guided_choice": []}, "guided_choice"),
            ({"guided_choice": ["x" * 60_000] * 2}, "guided_choice"),
            ({"guided_json": "nonsense"}, "guided_json"),
            ({"guided_json": "[" * 200}, "guided_json"),
            ({"guided_json": {"enum": ["x" * 70_000]}}, "guided_json"),
        ],
    )
    def test_what_makes_no_sense(self, server: Server, fields: dict[str, Any], param: str) -> None:
        reply = server.chat(**fields)
        assert (reply.status, reply.error["param"]) == (400, param)
        assert server.engine.submitted == []


names = st.from_regex(r"[a-z]{1,4}", fullmatch=True)
leaves = st.sampled_from(
    [
        {"type": "integer", "minimum": -9, "maximum": 99},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string", "maxLength": 4},
        {"type": "string", "pattern": "^[0-9a-f]{2,4}$"},
        {"enum": ["x", 1, None, {"a": [True]}]},
        {"const": 'a "quote"'},
        {"type": "string", "format": "date"},
        {"type": ["integer", "boolean"], "minimum": 0, "maximum": 3},
    ]
)


def nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    objects = st.dictionaries(names, inner, max_size=3).map(
        lambda fields: {
            "type": "object",
            "properties": fields,
            "required": sorted(fields)[:2],
            "additionalProperties": False,
        }
    )
    lists = st.builds(
        lambda item, most: {"type": "array", "items": item, "maxItems": most}, inner, st.integers(0, 2)
    )
    return objects | lists | st.lists(inner, min_size=1, max_size=2).map(lambda some: {"anyOf": some})


@given(schema=st.recursive(leaves, nested, max_leaves=6), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_schema(client: openai.OpenAI, schema: dict[str, Any], seed: int) -> None:
    done = client.chat.completions.create(
        model="tiny", messages=QUESTION, response_format=as_format(schema), temperature=2, seed=seed
    )
    assert done.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(done.choices[0].message.content or ""), schema)
