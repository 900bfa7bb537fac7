"""Bounds on what one rendering of a template may take: time, and the sizes of what it builds.

Checks come before the work where a single step could build something huge, because nothing can
interrupt such a step once it has begun.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import jinja2

T = TypeVar("T")

MAX_CHARACTERS = 1 << 24
"""The longest single text that a template may build, its output included."""

MAX_ITEMS = 1 << 17
"""The most items that a list, with all lists in it, may have."""

# All texts and lists that a rendering builds on its way, together.
_MAX_BUILT = 1 << 28
_MAX_INTEGER_BITS = 1 << 12

# Methods and filters whose result can be as large as the product of what they are given.
_GROWERS = frozenset(
    ("batch", "center", "expandtabs", "indent", "join", "ljust", "replace", "rjust", "slice", "zfill")
)
# What is assumed of an iterator, whose length nobody knows: the sandbox's longest range.
_UNKNOWN_LENGTH = 100_000

# A width or precision of five digits in a format string, and one that comes from an argument.
_WIDE_FIELD = re.compile(r"%[^%a-zA-Z]*\d{5}|\{[^{}]*:[^{}]*\d{5}")
_DYNAMIC_FIELD = re.compile(r"%[^%a-zA-Z]*\*|\{[^{}]*:[^{}]*\{")
_WIDE_ARGUMENT = re.compile(r"\d{5}")


class TemplateLimitError(jinja2.TemplateError):
    """A template that runs too long or builds something too large."""


class _Budget:
    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self.left = _MAX_BUILT


# Templates are also run while they are compiled, where constants are worked out in advance.
_budget: ContextVar[_Budget | None] = ContextVar("budget", default=None)


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Within this block, templates raise TemplateLimitError once they have taken too much."""
    token = _budget.set(_Budget(seconds))
    try:
        yield
    finally:
        _budget.reset(token)


def check_clock() -> None:
    """Raise TemplateLimitError if the time is up."""
    budget = _budget.get()
    if budget is not None and time.monotonic() > budget.deadline:
        raise TemplateLimitError("the chat template runs too long; it probably loops without end")


def check_size(size: int, limit: int = MAX_CHARACTERS) -> None:
    """Raise TemplateLimitError if `size` is beyond `limit`."""
    if size > limit:
        raise TemplateLimitError(f"the chat template builds something too large (the limit is {limit})")


def spend(value: T) -> T:
    """Count a new text or list against what a rendering may build in all, and return it."""
    budget = _budget.get()
    if budget is not None and isinstance(value, str | list | tuple):
        budget.left -= len(value)
        check_size(_MAX_BUILT - budget.left, _MAX_BUILT)
    return value


def bounded_join(parts: Iterable[str]) -> str:
    """`"".join(parts)`, given up as soon as it grows past the limit."""
    kept, size = [], 0
    for part in parts:
        size += len(part)
        check_size(size)
        kept.append(part)
    return "".join(kept)


def check_nesting(value: Any) -> Any:
    """Refuse a list that holds too much, counting what it holds several times as often; return it.

    Writing or comparing a list takes as long as that count, however little memory it takes.
    """
    pending, count = [value], 0
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            item = list(item.values())
        if isinstance(item, list | tuple):
            count += len(item)
            check_size(count, MAX_ITEMS)
            pending += item
    return value


def check_growth(name: str, values: Sequence[Any]) -> None:
    """Refuse a call of a method or filter, on these values, whose result could be too large."""
    if name == "format":
        _check_format(values)
    elif name in _GROWERS:
        check_size(math.prod(max(1, _measure(value)) for value in values), _MAX_BUILT)


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


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Refuse a sum, product, power or formatting whose result would be too large."""
    sized = [value for value in (left, right) if isinstance(value, Sized)]
    limit = MAX_CHARACTERS if any(isinstance(value, str) for value in sized) else MAX_ITEMS
    if operator == "%" and isinstance(left, str):
        _check_format([left, right])
    elif operator == "+" and len(sized) == 2:
        check_size(len(left) + len(right), limit)
    elif operator == "*" and sized:
        count = right if sized[0] is left else left
        check_size(len(sized[0]) * (count if isinstance(count, int) else 1), limit)
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        check_size(bits, _MAX_INTEGER_BITS)
