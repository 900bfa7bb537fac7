"""Grammars in llguidance's form, as the engine compiles them: what an answer may look like.

A part is one of llguidance's grammars, a Lark grammar or a JSON schema; `source` joins several of them.
See docs/syntax.md and docs/json_schema.md of https://github.com/guidance-ai/llguidance.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from runtime.errors import RequestError

Part = dict[str, Any]
Schema = dict[str, Any] | bool

# A space, or a new line and its indentation: what people and models write, and never more than that. Without
# a bound, a model at a high temperature can go on with white space for ever.
_WHITE_SPACE = r"[ ]|\n[ \t]{0,40}"
# The formats of strings that llguidance knows. JSON Schema has any other one be a mere remark.
_FORMATS = {"date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
_ASCII = {"\\d": "0-9", "\\w": "0-9A-Za-z_", "\\s": " \\t\\n\\r\\f\\v"}
_IN_LARK = {"/": "\\/", "\n": "\\n", "\\\n": "\\n", "\r": "\\r"}
# Keywords whose values hold schemas by names, and those whose values are no schemas at all.
_MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_DATA = {"const", "enum", "default", "examples"}


def json_schema(schema: Schema, *, lenient: bool = False) -> Part:
    """JSON that fits a schema; `lenient` leaves out what a grammar cannot express, instead of refusing it."""
    return {"json_schema": with_options(schema, lenient=lenient)}


def any_object() -> Part:
    """A JSON object of any kind."""
    return json_schema({"type": "object"})


def with_options(schema: Schema, *, lenient: bool = False) -> dict[str, Any]:
    """The schema with what llguidance is to do about white space, and about what it does not know."""
    whole = (
        rewritten(schema, _without_remarks) if isinstance(schema, dict) else {} if schema else {"enum": []}
    )
    return {**whole, "x-guidance": {"whitespace_pattern": _WHITE_SPACE, "lenient": lenient}}


def moved(schema: Schema, place: str) -> Schema:
    """The schema as it stands at `place` (a JSON pointer) of another one: its references point there."""

    def move(node: dict[str, Any]) -> dict[str, Any]:
        target = node.get("$ref")
        if not isinstance(target, str) or not target.startswith("#"):
            return node
        return node | {"$ref": f"#{place}{target[1:]}"}

    return rewritten(schema, move) if isinstance(schema, dict) else schema


def rewritten(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A copy of a schema in which it and every schema within has been changed."""
    if isinstance(schema, list):
        return [rewritten(item, change) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy: dict[str, Any] = {}
    for key, value in change(schema).items():
        if key in _MAPS and isinstance(value, dict):
            copy[key] = {name: rewritten(item, change) for name, item in value.items()}
        else:
            copy[key] = value if key in _DATA else rewritten(value, change)
    return copy


def _without_remarks(node: dict[str, Any]) -> dict[str, Any]:
    """The schema without keywords that say nothing."""
    silent = {"uniqueItems"} if node.get("uniqueItems") is False else set()
    if isinstance(node.get("format"), str) and node["format"] not in _FORMATS:
        silent.add("format")
    return {key: value for key, value in node.items() if key not in silent} if silent else node


def regex(pattern: str) -> Part:
    """A text that the pattern matches as a whole, in the syntax of Rust's regex crate."""
    return lark(f"start: /{_escaped(pattern)}/")


def choice(texts: Sequence[str]) -> Part:
    """One of these texts."""
    return lark("start: " + " | ".join(map(literal, texts)))


def lark(text: str) -> Part:
    """A grammar in llguidance's kind of Lark, with the rule `start`."""
    return {"lark_grammar": text}


def grammar(text: str) -> Part:
    """A grammar in Lark or in GBNF, llama.cpp's EBNF. Raises `RequestError` for GBNF that cannot be read."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return lark(any_to_lark(text))
    except Exception as error:  # it promises no narrower one
        raise RequestError(f"the grammar cannot be read: {error}") from None


def source(part: Part, **others: Part) -> str:
    """A grammar's text, as it is compiled. The part may refer to the others as `@name`."""
    named = [{"name": name, **other} for name, other in others.items()]
    return json.dumps({"grammars": [{"name": "main", **part}, *named]}, ensure_ascii=False)


def literal(text: str) -> str:
    """A text as Lark spells it."""
    return json.dumps(text, ensure_ascii=False)


def _escaped(pattern: str) -> str:
    """A regular expression as it may stand between the slashes of a Lark grammar.

    Digits, letters and white space are those that every dialect of regular expressions means by `\\d`, `\\w`
    and `\\s`, ASCII's, so that the answer also matches wherever the pattern is used again.
    """
    escaped, at, in_class = [], 0, False
    while at < len(pattern):
        step = 2 if pattern[at] == "\\" and at + 1 < len(pattern) else 1
        piece = pattern[at : at + step]
        if piece in _ASCII:
            piece = _ASCII[piece] if in_class else f"[{_ASCII[piece]}]"
        elif piece == "[":
            in_class = True
        elif piece == "]":
            in_class = False
        escaped.append(_IN_LARK.get(piece, piece))
        at += step
    return "".join(escaped)
