"""A Jinja environment for chat templates from strangers: nothing to reach, and bounds on time and size.

Jinja's sandbox keeps a template from reaching the interpreter, but lets it loop and grow without end.
Here every loop, macro and call passes a clock, and whatever could build a huge value in one step is
measured before it does. What a template can use is what transformers offers templates: `tojson` without
HTML escapes, `raise_exception`, `strftime_now`, `break`, `continue` and `{% generation %}`.
"""

from __future__ import annotations

import functools
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_CHARACTERS = 1 << 24
"""The longest text that a template may build, as output or on the way to it."""

_MAX_ITEMS = 1 << 20
_MAX_INTEGER_BITS = 1 << 12

# Methods and filters whose result can be as large as the product of what they are given.
_GROWERS = frozenset(
    ("batch", "center", "expandtabs", "indent", "join", "ljust", "replace", "rjust", "slice", "zfill")
)
_MAX_PRODUCT = 1 << 28
_UNKNOWN_LENGTH = 1 << 17

# A width or precision of five digits in a format string, and one that comes from an argument.
_WIDE_FIELD = re.compile(r"%[^%a-zA-Z]*\d{5}|\{[^{}]*:[^{}]*\d{5}")
_DYNAMIC_FIELD = re.compile(r"%[^%a-zA-Z]*\*|\{[^{}]*:[^{}]*\{")
_WIDE_ARGUMENT = re.compile(r"\d{5}")

_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)


class TemplateLimitError(jinja2.TemplateError):
    """A template that runs too long or builds something too large."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Within this block, templates raise TemplateLimitError once `seconds` have passed."""
    token = _deadline.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


def _check_clock() -> None:
    if time.monotonic() > _deadline.get():
        raise TemplateLimitError("the chat template runs too long; it probably loops without end")


def _check_size(size: int, limit: int = MAX_CHARACTERS) -> None:
    if size > limit:
        raise TemplateLimitError(f"the chat template builds something too large (the limit is {limit})")


def bounded_join(parts: Iterable[str]) -> str:
    """`"".join(parts)`, given up as soon as it grows past the limit."""
    kept, size = [], 0
    for part in parts:
        size += len(part)
        _check_size(size)
        kept.append(part)
    return "".join(kept)


def _check_growth(name: str, values: Sequence[Any]) -> None:
    """Refuse a call whose result could be too large, before it is made."""
    if name == "format":
        _check_format(values)
    elif name in _GROWERS:
        _check_size(math.prod(max(1, _measure(value)) for value in values), _MAX_PRODUCT)


def _measure(value: Any) -> int:
    """How many times over a value can make a result grow."""
    if isinstance(value, int):
        return value
    if isinstance(value, Iterator):
        return _UNKNOWN_LENGTH
    if isinstance(value, list | tuple):
        return sum(len(item) if isinstance(item, str) else 1 for item in value)
    return len(value) if hasattr(value, "__len__") else 1


def _check_format(values: Sequence[Any]) -> None:
    """`values` are a format string and what goes into it."""
    text, arguments = str(values[0]), values[1:]
    dynamic = _DYNAMIC_FIELD.search(text) and any(_WIDE_ARGUMENT.search(str(value)) for value in arguments)
    if dynamic or _WIDE_FIELD.search(text):
        raise TemplateLimitError("the chat template formats with a field that is too wide")


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_clock()
        _check_growth(name, [*args, *kwargs.values()])
        return function(*args, **kwargs)

    return bounded


# ---- what templates can call -------------------------------------------------------------------


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # templates may name the argument
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    _check_size(indent if isinstance(indent, int) else len(indent or ""), 64)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Generation(Extension):
    """Accepts `{% generation %}…{% endgeneration %}`, which marks text for training, as plain text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _check_public(names: Iterable[str]) -> None:
    for name in names:
        if name.startswith("_"):
            raise jinja2.TemplateError(f"a namespace cannot hold the name {name!r}")


class _PublicNamespace(Namespace):
    """Jinja's namespace without names that begin with an underscore."""

    # Without a named `self`, so that a namespace can hold that name too.
    def __init__(*args: Any, **kwargs: Any) -> None:
        _check_public(dict(*args[1:], **kwargs))
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public((name,))
        super().__setitem__(name, value)


# ---- the environment ---------------------------------------------------------------------------


class _Instrument(NodeTransformer):
    """Puts a look at the clock into every loop and macro, and sends `~` through a bounded join."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment

    def _call(self, method: str, args: list[nodes.Expr], line: int) -> nodes.Call:
        call = nodes.Call(nodes.EnvironmentAttribute(method), args, [], None, None)
        call.set_lineno(line, override=True)
        call.set_environment(self._environment)
        return call

    def _tick(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        statement = nodes.ExprStmt(self._call("tick", [], node.lineno), lineno=node.lineno)
        node.body.insert(0, statement.set_environment(self._environment))
        return node  # type: ignore[no-any-return]  # Jinja's nodes declare their fields at run time

    visit_For = visit_Macro = visit_CallBlock = _tick

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("concatenate", node.nodes, node.lineno)


class ChatTemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment that every chat template is compiled in."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    concat = staticmethod(bounded_join)

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        for name, function in self.filters.items():
            self.filters[name] = _bounded_filter(name, function)
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "namespace": _PublicNamespace,
        }

    def tick(self) -> None:
        """Called at the start of every loop's and macro's body; the clock is read by `call` itself."""

    def concatenate(self, *values: Any) -> str:
        """`a ~ b`."""
        return bounded_join(map(str, values))

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        _Instrument(self).visit(source)
        return super()._generate(source, name, filename, defer_init)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check_clock()
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        receiver = getattr(method, "__self__", None)
        _check_growth(getattr(method, "__name__", ""), [receiver, *args, *kwargs.values()])
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_clock()
        sized = [value for value in (left, right) if isinstance(value, Sized)]
        if operator == "%" and isinstance(left, str):
            _check_growth("format", [left, right])
        elif operator == "+" and len(sized) == 2:
            limit = MAX_CHARACTERS if isinstance(left, str) else _MAX_ITEMS
            _check_size(sum(map(len, sized)), limit)
        elif operator == "*" and sized:
            count = right if sized[0] is left else left
            limit = MAX_CHARACTERS if isinstance(sized[0], str) else _MAX_ITEMS
            _check_size(len(sized[0]) * (count if isinstance(count, int) else 1), limit)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            _check_size(bits, _MAX_INTEGER_BITS)
        return super().call_binop(context, operator, left, right)
