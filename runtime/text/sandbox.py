"""A Jinja environment for chat templates from strangers: nothing to reach, and bounds on time and size.

Jinja's sandbox keeps a template from reaching the interpreter, but lets it loop and grow without end.
Here every loop, macro and call passes a clock, and what could build a huge value is measured first.
What a template can use is what transformers offers templates: `tojson` without HTML escapes,
`raise_exception`, `strftime_now`, `break`, `continue` and `{% generation %}`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
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

from runtime.text.bounds import (
    bounded_join,
    check_clock,
    check_growth,
    check_nesting,
    check_operator,
    check_size,
    spend,
)

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
    check_size(indent if isinstance(indent, int) else len(indent or ""), 64)
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


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        check_clock()
        check_growth(name, [*args, *kwargs.values()])
        return spend(function(*args, **kwargs))

    return bounded


class _Instrument(NodeTransformer):
    """Rewrites a parsed template so that what Jinja would do on its own passes the bounds.

    Loops and macros get a look at the clock; `~`, slices and new lists go through the environment.
    """

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

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._call("copied", [node], node.lineno) if isinstance(node.arg, nodes.Slice) else node

    def _literal(self, node: nodes.Literal) -> nodes.Node:
        self.generic_visit(node)
        is_target = isinstance(node, nodes.Tuple) and node.ctx != "load"
        return node if is_target else self._call("gathered", [node], node.lineno)

    visit_List = visit_Tuple = visit_Dict = _literal


class ChatTemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment that every chat template is compiled in."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    concat = staticmethod(bounded_join)

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        for name, function in self.filters.items():
            self.filters[name] = _bounded_filter(name, function)
        # Nothing that a prompt needs, and a long loop in one call.
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "namespace": _PublicNamespace,
            # Where the prompt's text is tokenized piece by piece, what parts the pieces.
            "piece_boundary": "",
        }

    def tick(self) -> None:
        """Called at the start of every loop's and macro's body; the clock is read by `call` itself."""

    def concatenate(self, *values: Any) -> str:
        """`a ~ b`."""
        return bounded_join(map(str, values))

    def copied(self, value: Any) -> Any:
        """A slice; that it is counted is up to `call`."""
        return value

    def gathered(self, value: Any) -> Any:
        """A list, tuple or dict that the template spells out."""
        return check_nesting(value)

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        _Instrument(self).visit(source)
        return super()._generate(source, name, filename, defer_init)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        check_clock()
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        receiver = getattr(method, "__self__", None)
        check_growth(getattr(method, "__name__", ""), [receiver, *args, *kwargs.values()])
        result = spend(super().call(context, obj, *args, **kwargs))
        return check_nesting(result) if obj is dict else result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_clock()
        check_operator(operator, left, right)
        result = spend(super().call_binop(context, operator, left, right))
        return check_nesting(result) if isinstance(result, list | tuple) else result
