"""A YAML file as values that know where they stand, so that a mistake can be named by line and key.

Nothing is ever constructed from the file but text, numbers, lists of keys and their values: tags are
not followed, and YAML's looser spellings (`yes`, `0x10`, `1:30`) are not taken for what they resemble.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from runtime.errors import FirstlightError

_MAX_BYTES = 1 << 20
# The composer recurses, in C, without a limit of its own.
_MAX_DEPTH = 32
_TOO_DEEP = "nested too deeply", "A catalogue has few levels."
_INTEGER = re.compile(r"[+-]?(0|[1-9](_?[0-9]){0,17})")
_NUMBER = re.compile(r"[+-]?([0-9]{1,18}(\.[0-9]{0,18})?|\.[0-9]{1,18})([eE][+-]?[0-9]{1,2})?")
_TAG = "tag:yaml.org,2002:"


class CatalogueError(FirstlightError):
    """A mistake in a catalogue: in which file, on which line (from 1), under which key, and the remedy."""

    def __init__(self, path: Path, line: int | None, key: str | None, problem: str, remedy: str) -> None:
        place = str(path) + (f", line {line}" if line else "") + (f", {key}" if key else "")
        super().__init__(f"{place}: {problem}. {remedy}")
        self.path = path
        self.line = line
        self.key = key


class Value(NamedTuple):
    """One value of the file. `key` is the dotted path of keys that leads to it, empty for the whole."""

    path: Path
    key: str
    node: Any  # a yaml.Node; which kind, and hence which attributes, its `id` tells

    def error(self, problem: str, remedy: str) -> CatalogueError:
        """The error to raise when this value is not what it should be."""
        return CatalogueError(self.path, self.node.start_mark.line + 1, self.key or None, problem, remedy)

    @property
    def is_null(self) -> bool:
        """Whether nothing (or `null`, or `~`) is written here."""
        return bool(self.node.tag == _TAG + "null")

    def mapping(self, what: str, known: Collection[str] | None = None) -> dict[str, Value]:
        """The values under this one's keys; `known`, when given, holds every key there may be.

        `what` says in the error what was expected, e.g. "the models by their ids".
        """
        if self.node.id != "mapping":
            raise self.error(f"{self._seen()}, where {what} should be", "Write one `key: value` a line.")
        values: dict[str, Value] = {}
        for key_node, value_node in self.node.value:
            key = Value(self.path, self.key, key_node)._key_text()
            value = Value(self.path, f"{self.key}.{key}" if self.key else key, value_node)
            # The line of the key: what is wrong may be that nothing follows it.
            at_key = value._replace(node=key_node)
            if key in values:
                first = values[key].node.start_mark.line + 1
                raise at_key.error(f"written twice (first on line {first})", "Keep one of the two.")
            if known is not None and key not in known:
                raise at_key.error("unknown key", _suggest(key, known))
            values[key] = value
        return values

    def items(self, what: str) -> list[Value]:
        """The values of the list that is written here. `what` says in the error what was expected."""
        if self.node.id != "sequence":
            raise self.error(f"{self._seen()}, where {what} should be", "Write a list: [1, 2].")
        return [Value(self.path, f"{self.key}[{place}]", node) for place, node in enumerate(self.node.value)]

    def text(self, what: str) -> str:
        """The text written here, which must not be empty."""
        if self.node.id != "scalar" or self.node.tag != _TAG + "str":
            quote = " Put it in quotes." if self.node.id == "scalar" and not self.is_null else ""
            raise self.error(f"{self._seen()}, where {what} should be", f"Write text.{quote}")
        if not self.node.value.strip():
            raise self.error("empty", f"Write {what}, or leave the key out.")
        return str(self.node.value)

    def integer(self, what: str, low: int, high: int) -> int:
        """The whole number written here, from `low` to `high`."""
        if not self._is_plain or not _INTEGER.fullmatch(self.node.value):
            raise self.error(
                f"{self._seen()}, where {what} should be", f"Write a whole number from {low} to {high}."
            )
        number = int(self.node.value)
        if not low <= number <= high:
            raise self.error(f"{number} is out of range for {what}", f"Write {low} to {high}.")
        return number

    def number(self, what: str, low: float, high: float) -> float:
        """The number written here, from `low` to `high`."""
        if not self._is_plain or not _NUMBER.fullmatch(self.node.value):
            raise self.error(
                f"{self._seen()}, where {what} should be", f"Write a number from {low:g} to {high:g}."
            )
        number = float(self.node.value)
        if not low <= number <= high:
            raise self.error(f"{number:g} is out of range for {what}", f"Write {low:g} to {high:g}.")
        return number

    @property
    def _is_plain(self) -> bool:
        return bool(self.node.id == "scalar" and not self.node.style and self.node.tag.startswith(_TAG))

    def _key_text(self) -> str:
        if self.node.id != "scalar" or self.node.tag != _TAG + "str" or not self.node.value.strip():
            remedy = "Keys are text; put numbers and words such as yes, no, on and off in quotes."
            if self.node.tag == _TAG + "merge":
                remedy = "Write what several models share under the top-level key `defaults`."
            raise self.error(f"{self._seen()} as a key", remedy)
        return str(self.node.value)

    def _seen(self) -> str:
        if self.node.id == "mapping":
            return "a list of keys"
        if self.node.id == "sequence":
            return "a list"
        if self.is_null:
            return "nothing"
        kind = self.node.tag.removeprefix(_TAG)
        names = {"str": "the text", "int": "the number", "float": "the number", "bool": "the truth value"}
        return f"{names.get(kind, 'the value')} {_short(self.node.value)}"


def read_yaml(path: Path) -> Value | None:
    """Read a file with one YAML document; None if there is nothing in it. Raises CatalogueError."""
    import yaml

    text = _read_text(path)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                line = event.start_mark.line + 1 if event.start_mark else None
                raise CatalogueError(path, line, None, *_TOO_DEEP)
        node = yaml.compose(text, Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        if "nesting depth" in problem:  # a parser with a limit of its own may come first
            raise CatalogueError(path, mark and mark.line + 1, None, *_TOO_DEEP) from None
        raise CatalogueError(
            path,
            mark.line + 1 if mark else None,
            None,
            f"not YAML here: {problem}",
            "Look at this line and the one before it: indentation, colons, closing quotes and brackets.",
        ) from None
    return None if node is None else Value(path, "", node)


def _read_text(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        remedy = "Name another catalogue with --catalogue, or leave that out for the one that comes along."
        raise CatalogueError(path, None, None, f"cannot be read ({reason})", remedy) from error
    if len(data) > _MAX_BYTES:
        raise CatalogueError(path, None, None, "larger than 1 MiB", "Name a catalogue with --catalogue.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CatalogueError(path, line, None, "not UTF-8 text", "Save the file as UTF-8.") from None


def _suggest(key: str, known: Collection[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(key.lower(), known, n=1)
    return f"Did you mean {close[0]}?" if close else f"There may be: {', '.join(known)}."


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "…")
