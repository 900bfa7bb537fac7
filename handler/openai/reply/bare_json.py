"""Replies that are nothing but calls as JSON, as Llama 3 writes them and as any model can be asked to."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from handler.openai.reply.json_call import CallWriter, JsonCall
from handler.openai.reply.said import Content, Said

# What may stand in front of the JSON, and the fence that closes it.
_OPENERS = ("<|python_tag|>", "```json", "```")
_FENCE = "```"
_SPACE = " \t\r\n"


class BareJsonCalls:
    """Reads one call, several with `;`, `,` or nothing between them, or a JSON list of them.

    JSON alone is no call, because it can be an answer: it must name one of `names`. A reply that begins
    with anything else is content, whatever stands further on.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._state: Literal["start", "between", "call", "content"] = "start"
        self._waiting = ""
        self._undecided = ""  # what has been read, as long as it may turn out to be content
        self._call = JsonCall(plain=True)
        self._content = Content()
        self._calls = CallWriter()

    def push(self, text: str) -> Said:
        """See `CallReader`."""
        said = Said()
        self._waiting += text
        steps = {
            "start": self._read_start,
            "between": self._read_between,
            "call": self._read_call,
            "content": self._read_content,
        }
        while self._waiting and steps[self._state](said):
            pass
        return said

    def flush(self) -> Said:
        """See `CallReader`."""
        said = Said()
        if not self._calls.open:
            raw = self._call.raw if self._state == "call" else ""
            self._content.add(self._undecided + raw + self._waiting, said)
        self._waiting = ""
        self._content.end(said, after_calls=self._calls.count > 0)
        return said

    def _read_start(self, said: Said) -> bool:
        """Reads what may stand before the first call; says whether there is more to do. Likewise below."""
        self._skip(_SPACE)
        if not self._waiting:
            return False
        if not self._undecided.strip():
            opener = next((opener for opener in _OPENERS if self._waiting.startswith(opener)), None)
            if any(o.startswith(self._waiting) and o != opener for o in _OPENERS):
                return False
            if opener is not None:
                self._take(len(opener))
                return True
        self._state = "between" if self._waiting[0] in "{[" else "content"
        if self._waiting[0] == "[":
            self._take(1)
        return True

    def _read_between(self, said: Said) -> bool:
        """Between two calls, or before the first."""
        self._skip(_SPACE if self._undecided else _SPACE + ",;]")
        if not self._waiting:
            return False
        if self._waiting[0] == "{":
            self._state, self._call = "call", JsonCall(plain=True)
            return True
        if not self._undecided:
            if self._waiting.startswith(_FENCE):
                self._waiting = self._waiting[len(_FENCE) :]
            elif _FENCE.startswith(self._waiting):
                return False
        self._state = "content"
        return True

    def _read_call(self, said: Said) -> bool:
        call = self._call
        self._waiting = self._waiting[call.push(self._waiting) :]
        if call.begins and not self._calls.open and call.name in self._names:
            self._undecided = ""
            self._calls.write(call, said)
        elif self._calls.open:
            self._calls.write(call, said)
        elif call.begins or call.done or call.broken:
            self._undecided += call.raw
            self._state = "content"
            return True
        if call.done:
            self._calls.end(said)
            self._state = "between"
        elif call.broken:
            self._calls.open = False
            self._state = "content"
        return call.done or call.broken

    def _read_content(self, said: Said) -> bool:
        self._content.add(self._undecided + self._waiting, said)
        self._undecided = self._waiting = ""
        return False

    def _skip(self, characters: str) -> None:
        rest = self._waiting.lstrip(characters)
        self._take(len(self._waiting) - len(rest))

    def _take(self, count: int) -> None:
        # Before the first call it may yet be content; behind a call it is a part of the format.
        if not self._calls.count:
            self._undecided += self._waiting[:count]
        self._waiting = self._waiting[count:]
