"""What the grammars of calls let a model write, the readers read back; and it fits the functions' schemas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import numpy as np
import pytest

from handler.openai.reply.call_grammar import CallRules, Signature
from handler.openai.reply.formats import CALL_FORMATS, CallFormat
from handler.openai.reply.grammar import Thinking, reply_grammar
from handler.openai.reply.reader import ReplyReader
from handler.openai.reply.reasoning import Reasoning
from runtime.engine.grammar.grammars import Grammars
from runtime.errors import RequestError
from runtime.protocol import Grammar
from runtime.text import grammar
from runtime.text.grammar import literal
from runtime.text.tokenizer import Tokenizer
from tests.conftest import write_tokenizer
from tests.handler.test_reply import read

VOCAB = 300
WEATHER = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"type": "string", "maxLength": 6}},
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"weather": WEATHER, "weather_now": NOTHING}
SIGNATURES = [Signature(name, schema, strict=True) for name, schema in SCHEMAS.items()]
ANSWER = {
    "type": "object",
    "properties": {"name": {"enum": ["a", "b"]}},
    "required": ["name"],
    "additionalProperties": False,
}
HELD = sorted(CALL_FORMATS)
TAGS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|action_start|>", "<|plugin|>")


class Writer:
    """Writes what a grammar allows, token by token, each as likely as any other that may come."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = Tokenizer.load(directory)
        self.grammars = Grammars(directory, VOCAB)

    def tag(self, tag: str) -> str:
        token_id = self.tokenizer.id_of(tag)
        return literal(tag) if token_id is None else f"<[{token_id}]>"

    def write(self, source: str, seed: int, most: int = 600) -> str:
        """A whole text; fails if none of so many tokens comes about."""
        draw = Random(seed)
        matcher = self.grammars.matcher(Grammar(source, "x")).matcher
        ids: list[int] = []
        while len(ids) < most:
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little", count=VOCAB + 1)).tolist()
            token = draw.choice(allowed)
            # Where it may end it does, so that free text does not go on and on.
            if token == VOCAB or (allowed[-1] == VOCAB and draw.random() < 0.3):
                break
            assert matcher.consume_token(token)
            ids.append(token)
            if matcher.is_stopped():
                break
        assert len(ids) < most
        return self.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="module", params=["text", "tokens"])
def writer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Writer:
    """With tags that the vocabulary spells byte by byte, and with tags that are special tokens."""
    directory = tmp_path_factory.mktemp(request.param)
    write_tokenizer(directory)
    if request.param == "tokens":
        path = directory / "tokenizer.json"
        whole = json.loads(path.read_text(encoding="utf-8"))
        whole["added_tokens"] += [
            whole["added_tokens"][0] | {"id": 270 + n, "content": tag}
            for n, tag in enumerate((*TAGS, "</think>"))
        ]
        path.write_text(json.dumps(whole), encoding="utf-8")
    return Writer(directory)


def rules(writer: Writer, several: bool = True) -> CallRules:
    return CallRules(SIGNATURES, several, writer.tag)


def read_back(form: CallFormat, text: str, thinking: Thinking | None = None) -> tuple[str, list[Any]]:
    reasoning = Reasoning(thinking.begin, thinking.end, inside=thinking.inside) if thinking else None
    _, content, calls = read(ReplyReader(reasoning, form.reader(SCHEMAS)), [*text])
    return content, calls


def check(calls: list[Any]) -> None:
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize("name", HELD)
def test_calls_that_must_be_made(writer: Writer, name: str) -> None:
    form = CALL_FORMATS[name]
    numbers = set()
    for seed in range(25):
        held = form.grammar(rules(writer))
        text = writer.write(reply_grammar(None, held, must_call=True, thinking=None, tag=writer.tag), seed)
        content, calls = read_back(form, text)
        assert (content, bool(calls)) == ("", True)
        check(calls)
        numbers.add(min(len(calls), 2))
    assert numbers == ({1} if name == "chatglm3" else {1, 2})


@pytest.mark.parametrize("name", HELD)
def test_one_call_and_no_more(writer: Writer, name: str) -> None:
    form = CALL_FORMATS[name]
    for seed in range(10):
        held = form.grammar(rules(writer, several=False))
        text = writer.write(reply_grammar(None, held, must_call=True, thinking=None, tag=writer.tag), seed)
        _, calls = read_back(form, text)
        assert len(calls) == 1


@pytest.mark.parametrize("name", HELD)
def test_an_answer_in_a_form_or_calls(writer: Writer, name: str) -> None:
    form = CALL_FORMATS[name]
    said = set()
    for seed in range(25):
        held, content = form.grammar(rules(writer)), grammar.json_schema(ANSWER)
        source = reply_grammar(content, held, must_call=False, thinking=None, tag=writer.tag)
        answer, calls = read_back(form, writer.write(source, seed))
        check(calls)
        if not calls:
            jsonschema.validate(json.loads(answer), ANSWER)
        said.add(bool(calls))
    assert True in said or name in ("json", "llama3_json")


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        (lambda call: "", True),
        (lambda call: "\nWell, {x} [y].", True),
        (lambda call: call, True),
        (lambda call: call.replace('"x"', "7"), False),
        (lambda call: call.replace("weather", "whether"), False),
    ],
)
def test_calls_among_free_text(tmp_path: Path, name: str, text: Callable[[str], str], allowed: bool) -> None:
    """Nobody must call, but who does must do it right."""
    write_tokenizer(tmp_path)
    writer = Writer(tmp_path)
    form = CALL_FORMATS[name]
    held = form.grammar(rules(writer))
    source = reply_grammar(None, held, must_call=False, thinking=None, tag=writer.tag)
    once = reply_grammar(None, form.grammar(fixed(writer)), must_call=True, thinking=None, tag=writer.tag)
    call = writer.write(once, seed=0)
    matcher = writer.grammars.matcher(Grammar(source, "x")).matcher
    ids = writer.tokenizer.encode(text(call), add_special_tokens=False)
    taken = matcher.try_consume_tokens(ids)
    assert (taken == len(ids) and matcher.is_accepting()) == allowed


def fixed(writer: Writer) -> CallRules:
    city = {"type": "object", "properties": {"city": {"const": "x"}}, "required": ["city"]}
    return CallRules([Signature("weather", city | {"additionalProperties": False}, True)], False, writer.tag)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("must_call", [True, False])
def test_reasoning_comes_first_and_is_free(writer: Writer, inside: bool, must_call: bool) -> None:
    form = CALL_FORMATS["hermes"]
    thinking = Thinking("<think>", "</think>", inside)
    held, content = form.grammar(rules(writer)), grammar.json_schema(ANSWER)
    source = reply_grammar(
        content, held if must_call else None, must_call=must_call, thinking=thinking, tag=writer.tag
    )
    matcher = writer.grammars.matcher(Grammar(source, "x")).matcher
    opening = "" if inside else "<think>"
    ids = writer.tokenizer.encode(
        f'{opening}\nHm: {{"name": 5}}, or not?\n</think>\n\n', add_special_tokens=False
    )
    assert matcher.try_consume_tokens(ids) == len(ids)
    assert not matcher.is_accepting()
    answer = (
        '<tool_call>\n{"name": "weather_now", "arguments": {}}\n</tool_call>'
        if must_call
        else '{"name": "a"}'
    )
    ids = writer.tokenizer.encode(answer, add_special_tokens=False)
    assert matcher.try_consume_tokens(ids) == len(ids)
    assert matcher.is_accepting()
    if not inside:
        whole = writer.grammars.matcher(Grammar(source, "x")).matcher
        assert whole.try_consume_tokens(ids) == len(ids)


class TestChatGlm3:
    SCHEMA = {
        "type": "object",
        "properties": {
            "deep": {
                "type": "object",
                "properties": {"a": {"type": "array", "items": {"type": "null"}, "maxItems": 2}},
                "additionalProperties": False,
            },
            "flag": {"type": "boolean"},
            "text": {"type": "string", "maxLength": 5},
            "nothing": {"type": "null"},
        },
        "additionalProperties": False,
    }

    @pytest.mark.parametrize("required", [[], ["flag"], ["text", "nothing"]])
    def test_values_are_read_as_python_and_as_json(self, tmp_path: Path, required: list[str]) -> None:
        write_tokenizer(tmp_path)
        writer, form = Writer(tmp_path), CALL_FORMATS["chatglm3"]
        schema = self.SCHEMA | {"required": required}
        held = form.grammar(CallRules([Signature("weather", schema, True)], False, writer.tag))
        source = reply_grammar(None, held, must_call=True, thinking=None, tag=writer.tag)
        seen = set()
        for seed in range(40):
            content, calls = read_back(form, writer.write(source, seed))
            assert content == ""
            ((_, arguments),) = calls
            jsonschema.validate(json.loads(arguments), schema)
            seen.update(json.loads(arguments))
        assert seen == set(self.SCHEMA["properties"])  # type: ignore[call-overload]

    def test_what_is_no_argument_in_python(self) -> None:
        schema = {"type": "object", "properties": {"from": {"type": "string"}}}
        with pytest.raises(RequestError, match="'from' of 'weather'"):
            CALL_FORMATS["chatglm3"].grammar(CallRules([Signature("weather", schema, True)], False, literal))
