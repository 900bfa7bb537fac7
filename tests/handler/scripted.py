"""A model that does what it is asked for, so that a client's tests judge the protocol and nobody's wits.

It is the fake engine with a script. Its chat template writes conversations as JSON, which it reads back.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from runtime.protocol import Submit
from runtime.text.tokenizer import Tokenizer
from tests.handler.fake_engine import READY, FakeEngine

# The mentions are what tells the server how this model writes its calls and its reasoning.
TEMPLATE = (
    "{# <tool_call> <think> </think> #}{{ messages | tojson }}\n{{ tools | tojson if tools else 'null' }}\n"
)
THOUGHT = "Let me see."
GREETING = "Hello there, friend. How are you today?"
CONTEXT = 100_000


class ScriptedModel:
    """What the engine says to each request."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, submit: Submit) -> str:
        messages, tools = map(json.loads, self._tokenizer.decode(submit.prompt_token_ids).splitlines())
        grammar = submit.sampling.grammar
        held_to = json.loads(grammar.source)["grammars"] if grammar is not None else []
        question = messages[-1]
        if tools and (question["role"] == "user" or held_to):
            return _call(tools, question["content"], json.dumps(held_to))
        if held_to:
            (schema,) = (part["json_schema"] for part in held_to if "json_schema" in part)
            return json.dumps(instance(schema, question["content"]))
        if question["content"].startswith("Think"):
            return f"<think>{THOUGHT}</think>{GREETING}"
        return "That was all." if question["role"] == "tool" else GREETING


def _call(tools: list[dict[str, Any]], question: str, held_to: str) -> str:
    """A call of the tool that the question names or that a grammar holds it to, else of the first one."""
    functions = [tool["function"] for tool in tools]
    meant = [f for f in functions if f["name"] in question] or [f for f in functions if f["name"] in held_to]
    function = (meant or functions)[0]
    arguments = instance(function.get("parameters") or {}, question)
    call = json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def instance(schema: dict[str, Any], question: str) -> Any:
    """A value that fits a JSON schema, made of the first number and the first quotation of the question."""
    return _instance(schema, schema.get("$defs", {}), question)


def _instance(schema: dict[str, Any], defined: dict[str, Any], question: str) -> Any:
    if "$ref" in schema:
        return _instance(defined[schema["$ref"].rpartition("/")[2]], defined, question)
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return _instance(schema[choice][0], defined, question)
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "integer" | "number":
            found = re.search(r"\d+", question)
            return int(found[0]) if found else 1
        case "string":
            found = re.search(r"'([^']+)'", question)
            return found[1] if found else "some text"
        case "boolean":
            return True
        case "array":
            return [_instance(schema.get("items", {}), defined, question)]
        case "null":
            return None
    # Without properties, those that the question names in quotes.
    named = {name: {"type": "string"} for name in re.findall(r"'(\w+)'", question)}
    parts = schema.get("properties") or named
    return {name: _instance(part, defined, question) for name, part in parts.items()}


def prepare(engine: FakeEngine) -> None:
    """Give the fake the script, and room for it."""
    engine.info = msgspec.structs.replace(READY, max_model_len=CONTEXT)
    engine.reply = ScriptedModel(engine.tokenizer)
