"""Grammars of tool calls, as each family writes them and the readers beside this file read them back.

They are rules in llguidance's Lark, of which `calls` stands for one or more calls.
"""

from __future__ import annotations

import json
import keyword
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from handler.openai.reply.mistral import ARGUMENTS, BEGIN
from runtime.errors import RequestError
from runtime.text.grammar import literal, moved, with_options

# A text that cannot be taken for the beginning of a call in bare JSON.
_NO_JSON = "NO_JSON: /\\s*[^\\s{\\[](.|\\n)*/"


@dataclass(frozen=True)
class Signature:
    """A function that may be called, and the JSON schema of its arguments.

    What a grammar cannot express of a schema is left out, unless it is `strict`: then it is refused.
    """

    name: str
    schema: dict[str, Any]
    strict: bool


@dataclass(frozen=True)
class CallRules:
    """The calls that may be made: `several` of them in a row or just one.

    `tag` gives a tag as Lark has it: a special token of the vocabulary, or plain text.
    """

    functions: Sequence[Signature]
    several: bool
    tag: Callable[[str], str]


@dataclass(frozen=True)
class CallGrammar:
    """The rule `calls`; and the rule `free`: any text, with calls in it or without.

    `free` refers to `TEXT`, which is any text but for special tokens.
    """

    calls: str
    free: str


def hermes(rules: CallRules) -> CallGrammar:
    """`<tool_call>`, the call as JSON, `</tool_call>`, each on a line of its own."""
    rest = f'"\\n" body "\\n" {rules.tag("</tool_call>")}'
    return _tagged(rules, "<tool_call>", rest, _bodies(rules, "arguments"), between='"\\n"')


def internlm(rules: CallRules) -> CallGrammar:
    """`<|action_start|><|plugin|>`, the call as JSON, `<|action_end|>`."""
    rest = f'{rules.tag("<|plugin|>")} "\\n"? body {rules.tag("<|action_end|>")}'
    return _tagged(rules, "<|action_start|>", rest, _bodies(rules, "parameters"))


def mistral(rules: CallRules) -> CallGrammar:
    """`[TOOL_CALLS]` and a list of calls as JSON; in later vocabularies, which have the token `[ARGS]`,
    `[TOOL_CALLS]`, a name, `[ARGS]` and the arguments as JSON, for each call."""
    if rules.tag(ARGUMENTS) != literal(ARGUMENTS):
        return _mistral_named(rules)
    more = ' (", " body)*' if rules.several else ""
    rest = f'" "? "[" body{more} "]"'
    return _tagged(rules, BEGIN, rest, _bodies(rules, "arguments"), once=True)


def _mistral_named(rules: CallRules) -> CallGrammar:
    names = " | ".join(f"body_{n}" for n in range(len(rules.functions)))
    bodies = [f"body: {names}"]
    for n, function in enumerate(rules.functions):
        bodies.append(f"body_{n}: {literal(function.name)} {rules.tag(ARGUMENTS)} args_{n}")
        bodies.append(_arguments(n, function))
    return _tagged(rules, BEGIN, "body", bodies)


def chatglm3(rules: CallRules) -> CallGrammar:
    """A line with the function's name, then a call in Python, whose values are spelled as JSON is."""
    lines = ["calls: " + " | ".join(f"call_{n}" for n in range(len(rules.functions)))]
    for n, function in enumerate(rules.functions):
        head, tail = literal(f"{function.name}\n ```python\ntool_call("), literal(")\n```")
        lines.append(f"call_{n}: {head} ({_keywords(function)}) {tail}")
    calls = "\n".join(lines)
    # A reply without a call begins with an empty line.
    return CallGrammar(calls, f'free: ("\\n" TEXT)? | calls\n{calls}')


def _keywords(function: Signature) -> str:
    """The keyword arguments that fit a function's schema: those that are required, then any of the others."""
    schema = function.schema
    fields = schema.get("properties", {})
    for name in fields:
        if not name.isidentifier() or keyword.iskeyword(name):
            message = (
                f"this model calls in Python, where '{name}' of '{function.name}' is no argument's name."
            )
            raise RequestError(message, "tools")
    shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    given = {}
    for name, field in fields.items():
        value = _as_json({**_as_object(field), **shared}, lenient=not function.strict)
        given[name] = f"{literal(f'{name}=')} {value}"
    required = [name for name in given if name in schema.get("required", ())]
    others = [name for name in given if name not in required]
    more = [f'(", " {given[name]})?' for name in others]
    if required:
        return " ".join([' ", " '.join(given[name] for name in required), *more])
    return " | ".join(['""', *(" ".join([given[name], *more[n + 1 :]]) for n, name in enumerate(others))])


def _as_object(schema: Any) -> dict[str, Any]:
    return schema if isinstance(schema, dict) else {} if schema else {"enum": []}


def llama3_json(rules: CallRules) -> CallGrammar:
    """The calls as JSON with nothing around them, parted by `; `."""
    more = ' ("; " call)*' if rules.several else ""
    return _bare(f"calls: call{more}\ncall: {_json(rules, _any_call(rules, 'parameters', ''))}")


def bare_json(rules: CallRules) -> CallGrammar:
    """The call as JSON, or several in a JSON list."""
    if not rules.several:
        return _bare(f"calls: {_json(rules, _any_call(rules, 'arguments', ''))}")
    one = _any_call(rules, "arguments", "/anyOf/0")
    many = {"type": "array", "items": _any_call(rules, "arguments", "/anyOf/1/items"), "minItems": 1}
    return _bare(f"calls: {_json(rules, {'anyOf': [one, many]})}")


def _bare(calls: str) -> CallGrammar:
    return CallGrammar(calls, f"free: NO_JSON? | calls\n{_NO_JSON}\n{calls}")


def _tagged(
    rules: CallRules,
    begin: str,
    rest: str,
    bodies: Sequence[str],
    *,
    between: str = "",
    once: bool = False,
) -> CallGrammar:
    """Calls that begin with a tag, which is how they are found in a text."""
    tag = rules.tag(begin)
    several = rules.several and not once
    shared = "\n".join((f"rest: {rest}", *bodies))
    calls = f"calls: call ({between} call)*" if several else "calls: call"
    many = "*" if several else "?"
    if tag == literal(begin):
        found = f"free: (found rest){many} TEXT\nfound[lazy]: TEXT {tag}"
    else:
        found = f"free: (TEXT {tag} rest){many} TEXT"
    return CallGrammar(f"{calls}\ncall: {tag} rest\n{shared}", f"{found}\n{shared}")


def _bodies(rules: CallRules, key: str) -> list[str]:
    """The rule `body`: a call as a JSON object, spelled as models are taught to."""
    lines = ["body: " + " | ".join(f"body_{n}" for n in range(len(rules.functions)))]
    for n, function in enumerate(rules.functions):
        head = f'{{"name": {json.dumps(function.name)}, "{key}": '
        lines += [f'body_{n}: {literal(head)} args_{n} "}}"', _arguments(n, function)]
    return lines


def _arguments(n: int, function: Signature) -> str:
    return f"args_{n}: {_as_json(function.schema, lenient=not function.strict)}"


def _any_call(rules: CallRules, key: str, place: str) -> dict[str, Any]:
    """The schema of a call as JSON, for the `place` in a schema that it is put at."""
    calls = []
    for n, function in enumerate(rules.functions):
        here = f"{place}/anyOf/{n}/properties/{key}"
        fields = {"name": {"const": function.name}, key: moved(function.schema, here)}
        calls.append(
            {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
        )
    return {"anyOf": calls}


def _json(rules: CallRules, schema: dict[str, Any]) -> str:
    return _as_json(schema, lenient=not any(function.strict for function in rules.functions))


def _as_json(schema: dict[str, Any], *, lenient: bool) -> str:
    return f"%json {json.dumps(with_options(schema, lenient=lenient), ensure_ascii=False)}"
