"""One tool call as a JSON object, `{"name": "...", "arguments": {...}}`, read while it arrives."""

from __future__ import annotations

import json
import re
from typing import Literal

from handler.openai.reply.said import CallDelta, Said

_SPACE = " \t\r\n"
_IN_STRING = re.compile(r'[^"\\]*')
_IN_CONTAINER = re.compile(r'[^"{}\[\]]*')
_IN_PRIMITIVE = re.compile(r"[^,\]}\s]*")
_CLOSER = {"{": "}", "[": "]"}
# "parameters" is how Llama 3 and InternLM spell it.
_ARGUMENTS = ("arguments", "parameters")
_KEYS = ("name", "type", "id", *_ARGUMENTS)


class JsonValue:
    """Finds the end of one JSON value. `kind` is its first character; what is inside is not judged."""

    def __init__(self) -> None:
        self.kind = ""
        self.done = False
        self.broken = False
        self._closers: list[str] = []
        self._in_string = False
        self._escaped = False

    def push(self, text: str, at: int) -> int:
        """Read `text` from `at`, which at first is the value's beginning; returns where reading ended."""
        while at < len(text) and not (self.done or self.broken):
            if self._in_string:
                at = self._read_string(text, at)
            elif not self._closers and self.kind and self.kind not in '{["':
                at = _IN_PRIMITIVE.match(text, at).end()  # type: ignore[union-attr]  # it matches anything
                self.done = at < len(text)
            else:
                at = self._read_mark(text, at)
        return at

    def _read_string(self, text: str, at: int) -> int:
        if self._escaped:
            self._escaped = False
            return at + 1
        at = _IN_STRING.match(text, at).end()  # type: ignore[union-attr]  # it matches anything
        if at == len(text):
            return at
        if text[at] == "\\":
            self._escaped = True
        else:
            self._in_string = False
            self.done = not self._closers
        return at + 1

    def _read_mark(self, text: str, at: int) -> int:
        if self.kind:
            at = _IN_CONTAINER.match(text, at).end()  # type: ignore[union-attr]  # it matches anything
            if at == len(text):
                return at
        mark = text[at]
        if not self.kind and mark in ",:":
            self.broken = True
            return at
        self.kind = self.kind or mark
        if mark == '"':
            self._in_string = True
        elif mark in _CLOSER:
            self._closers.append(_CLOSER[mark])
        elif mark in "}]":
            if not self._closers or self._closers.pop() != mark:
                self.broken = True
                return at
            self.done = not self._closers
        return at + 1


class JsonCall:
    """One call on its way.

    It `begins` once its name is known and its arguments have been reached; from then on the arguments
    are handed out as they come. It is `broken` where it cannot be a call: `raw` is what was read so far.
    With `plain` so is an object with keys that calls do not have, before it has begun: it may be anything.
    """

    def __init__(self, *, plain: bool = False) -> None:
        self.name: str | None = None
        self.done = False
        self.broken = False
        self._plain = plain
        self.raw = ""
        self._expected: Literal["{", "key", ":", "value", ","] = "{"
        self._value: JsonValue | None = None
        self._key: str | None = None
        self._token = ""
        self._arguments_key: str | None = None
        self._ready = ""

    @property
    def begins(self) -> bool:
        """Whether this is a call beyond doubt."""
        return self.name is not None and self._arguments_key is not None

    def push(self, text: str) -> int:
        """Read until the object ends or is broken; returns how many characters were taken."""
        at = 0
        while at < len(text) and not (self.done or self.broken):
            if self._value is not None:
                at = self._read_value(self._value, text, at)
            elif text[at] in _SPACE:
                at += 1
            else:
                at = self._read_mark(text, at)
        self.raw += text[:at]
        return at

    def take_arguments(self) -> str:
        """The arguments' text that has come since the last call."""
        ready, self._ready = self._ready, ""
        return ready

    def _read_mark(self, text: str, at: int) -> int:
        mark = text[at]
        expected = self._expected
        if expected in ("key", "value") and not (expected == "key" and mark != '"'):
            self._value = JsonValue()
            self._token = ""
            return at
        if mark == "}" and expected in ("key", ","):
            self.done = True
        elif mark == expected == "{" or (mark == expected == ","):
            self._expected = "key"
        elif mark == expected == ":":
            self._expected = "value"
        else:
            self.broken = True
            return at
        return at + 1

    def _read_value(self, value: JsonValue, text: str, at: int) -> int:
        end = value.push(text, at)
        piece = text[at:end]
        if self._is_arguments() and value.kind == "{":
            self._arguments_key = self._key
            self._ready += piece
        else:
            self._token += piece
        if value.broken:
            self.broken = True
        elif value.done:
            self._value = None
            self._end_value(value.kind)
        return end

    def _is_arguments(self) -> bool:
        if self._expected != "value" or self._key not in _ARGUMENTS:
            return False
        return self._arguments_key in (None, self._key)

    def _end_value(self, kind: str) -> None:
        if self._expected == "key":
            self._key = self._decoded()
            self._expected = ":"
            odd = self._plain and not self.begins and self._key not in _KEYS
            self.broken = odd or self._key is None
            return
        is_arguments = self._is_arguments()
        self._expected = ","
        if self._key == "name" and self.name is None:
            self.name = self._decoded()
            self.broken = self.name is None
        elif is_arguments and kind != "{":
            self._arguments_key = self._key
            # Some models write the arguments as a string that holds the JSON, or null for none.
            text = self._decoded()
            self._ready += text if text is not None else "{}" if self._token == "null" else self._token

    def _decoded(self) -> str | None:
        """The string that was read, if it is one that can be sent on."""
        try:
            value = json.loads(self._token)
            return value if isinstance(value, str) and value.encode() else None
        except ValueError:  # lone surrogates included
            return None


class CallWriter:
    """Turns what a `JsonCall` has into deltas, and numbers the calls. What is out cannot be taken back."""

    def __init__(self) -> None:
        self.count = 0
        self.open = False
        self._empty = True

    def write(self, call: JsonCall, said: Said) -> None:
        """What is new of `call`, which has a name."""
        assert call.name is not None
        if not self.open:
            self.begin(call.name, said)
        self.go_on(call.take_arguments(), said)

    def begin(self, name: str, said: Said) -> None:
        """A call of `name` begins."""
        self.open, self._empty = True, True
        said.call(CallDelta(self.count, name=name))
        self.count += 1

    def go_on(self, arguments: str, said: Said) -> None:
        """More of its arguments."""
        if arguments:
            self._empty = False
            said.call(CallDelta(self.count - 1, arguments=arguments))

    def end(self, said: Said) -> None:
        """The call is complete; one without arguments has empty ones."""
        if self._empty:
            self.go_on("{}", said)
        self.open = False
