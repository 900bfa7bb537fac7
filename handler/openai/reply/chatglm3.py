"""ChatGLM3's replies: a first line that is empty or names a tool, then the content or a call in Python.

get_weather
 ```python
tool_call(city='Beijing')
```
"""

from __future__ import annotations

import ast
import io
import itertools
import json
import re
import tokenize
from collections.abc import Collection

from handler.openai.reply.json_call import CallWriter
from handler.openai.reply.said import Said

_JSON_NAMES = {"true": True, "false": False, "null": None}
# An argument may have a fence in it, but no line of a call begins with one.
_CODE = re.compile(r"```(?:python)?\s*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


class ChatGlm3Calls:
    """Reads replies whose first line names one of `names`; all others are content without that line's end."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._waiting = ""
        self._is_content = False
        self._calls = CallWriter()

    def push(self, text: str) -> Said:
        """See `CallReader`."""
        if self._is_content:
            return Said(content=text)
        self._waiting += text
        line, end, rest = self._waiting.partition("\n")
        if end and line.strip() in self._names:
            return Said()  # the code must be whole before it can be read
        if not end and (not line.strip() or any(name.startswith(line.strip()) for name in self._names)):
            return Said()
        if not line.strip() and not rest.strip():
            return Said()  # the content begins with its first visible character
        self._is_content = True
        return Said(content=self._waiting if line.strip() else rest.lstrip())

    def flush(self) -> Said:
        """See `CallReader`."""
        said = Said()
        if self._is_content:
            return said
        line, _, rest = self._waiting.partition("\n")
        arguments = _arguments(rest)
        if line.strip() in self._names and arguments is not None:
            self._calls.begin(line.strip(), said)
            self._calls.go_on(arguments, said)
        elif line.strip():
            said.content = self._waiting
        return said


class _Constants(ast.NodeTransformer):
    """Values that are spelled as in JSON, as Python spells them."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(_JSON_NAMES[node.id]) if node.id in _JSON_NAMES else node


def _arguments(text: str) -> str | None:
    """The keyword arguments of the call in a piece of Python, as JSON; None if there is no such call."""
    code = _CODE.search(text)
    expression = code[1].strip().removesuffix("```") if code else text.strip()
    try:
        tree = ast.parse(_with_any_names(expression).strip(), mode="eval")
        call = _Constants().visit(tree).body
        if not isinstance(call, ast.Call) or call.args or any(item.arg is None for item in call.keywords):
            return None
        return json.dumps({str(item.arg)[1:]: ast.literal_eval(item.value) for item in call.keywords})
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError):
        return None


def _with_any_names(expression: str) -> str:
    """The expression with `_` before the name of each argument: a tool may call one `from` or `class`."""
    tokens = [(each.type, each.string) for each in tokenize.generate_tokens(io.StringIO(expression).readline)]
    for index, ((kind, name), (_, following)) in enumerate(itertools.pairwise(tokens)):
        if kind == tokenize.NAME and following == "=":
            tokens[index] = kind, f"_{name}"
    return tokenize.untokenize(tokens)
