"""Grammars in llguidance's form, as the engine compiles them: what an answer may look like.

A part is one of llguidance's grammars, a Lark grammar or a JSON schema; `source` joins several of them.
See docs/syntax.md and docs/json_schema.md of https://github.com/guidance-ai/llguidance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from runtime.errors import RequestError

Part = dict[str, Any]

# A space, or a new line and its indentation: what people and models write, and never more than that. Without
# a bound, a model at a high temperature can go on with white space for ever.
_WHITE_SPACE = r"[ ]|\n[ \t]{0,40}"


def json_schema(schema: dict[str, Any] | bool, *, lenient: bool = False) -> Part:
    """JSON that fits a schema; `lenient` leaves out what a grammar cannot express, instead of refusing it."""
    return {"json_schema": with_options(schema, lenient=lenient)}


def with_options(schema: dict[str, Any] | bool, *, lenient: bool = False) -> dict[str, Any]:
    """The schema with what llguidance is to do about white space and about what it does not know."""
    whole = schema if isinstance(schema, dict) else {} if schema else {"enum": []}
    return whole | {"x-guidance": {"whitespace_pattern": _WHITE_SPACE, "lenient": lenient}}


def any_object() -> Part:
    """A JSON object of any kind."""
    return json_schema({"type": "object"})


def regex(pattern: str) -> Part:
    """A text that the pattern matches as a whole, in the syntax of Rust's regex crate."""
    return lark(f"start: /{escaped_pattern(pattern)}/")


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


def escaped_pattern(pattern: str) -> str:
    """A regular expression as it may stand between the slashes of a Lark grammar."""
    escaped, at = [], 0
    while at < len(pattern):
        step = 2 if pattern[at] == "\\" and at + 1 < len(pattern) else 1
        piece = pattern[at : at + step]
        escaped.append({"/": "\\/", "\n": "\\n", "\\\n": "\\n", "\r": "\\r"}.get(piece, piece))
        at += step
    return "".join(escaped)
