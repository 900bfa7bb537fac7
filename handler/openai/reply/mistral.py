"""Mistral's calls: `[TOOL_CALLS]`, then a JSON list of calls, or a name and its arguments as JSON."""

from __future__ import annotations

from typing import Literal

from handler.openai.reply.json_call import CallWriter, JsonCall, JsonValue
from handler.openai.reply.said import Content, Said, held_back

BEGIN = "[TOOL_CALLS]"
ARGUMENTS = "[ARGS]"
CALL_ID = "[CALL_ID]"
_SPACE = " \t\r\n"


class MistralCalls:
    """Reads both of Mistral's formats; what stands behind the mark and is no call is content."""

    def __init__(self) -> None:
        self._state: Literal["content", "marked", "list", "call", "name", "arguments"] = "content"
        self._waiting = ""
        self._behind_mark = ""  # what would be content again, should no call come of it
        self._call = JsonCall()
        self._value = JsonValue()
        self._content = Content()
        self._calls = CallWriter()

    def push(self, text: str) -> Said:
        """See `CallReader`."""
        said = Said()
        self._waiting += text
        steps = {
            "content": self._read_content,
            "marked": self._read_marked,
            "list": self._read_list,
            "call": self._read_call,
            "name": self._read_name,
            "arguments": self._read_arguments,
        }
        while self._waiting and steps[self._state](said):
            pass
        return said

    def flush(self) -> Said:
        """See `CallReader`."""
        said = Said()
        if self._state == "call" and not self._calls.open:
            self._behind_mark += self._call.raw
        if not self._calls.open:
            self._content.add(self._behind_mark + self._waiting, said)
        self._waiting = ""
        self._content.end(said, after_calls=self._calls.count > 0)
        return said

    def _read_content(self, said: Said) -> bool:
        """Reads up to the next mark; says whether there is more to do. Likewise those below."""
        at = self._waiting.find(BEGIN)
        found = at >= 0
        if not found:
            at = len(self._waiting) - held_back(self._waiting, (BEGIN,))
        self._content.add(self._waiting[:at], said)
        self._waiting = self._waiting[at:]
        if found:
            self._behind_mark, self._waiting = BEGIN, self._waiting[len(BEGIN) :]
            self._state = "marked"
        return found

    def _read_marked(self, said: Said) -> bool:
        self._skip_space()
        if not self._waiting:
            return False
        if self._waiting[0] == "[":
            self._behind_mark += "["
            self._waiting = self._waiting[1:]
        elif self._waiting[0] != "{":
            self._state = "name"
            return True
        self._state = "list"
        return True

    def _read_list(self, said: Said) -> bool:
        self._skip_space()
        behind_a_call = not self._behind_mark
        if self._waiting[:1] == "{":
            self._state, self._call = "call", JsonCall()
        elif self._waiting[:1] == "," and behind_a_call:
            self._waiting = self._waiting[1:]
        elif self._waiting[:1] == "]" and behind_a_call:
            self._waiting = self._waiting[1:]
            self._state = "content"
        elif self._waiting:
            self._give_up(said)
        return bool(self._waiting)

    def _read_call(self, said: Said) -> bool:
        call = self._call
        self._waiting = self._waiting[call.push(self._waiting) :]
        if call.begins or (call.done and call.name is not None):
            self._calls.write(call, said)
            self._behind_mark = ""
        if not (call.done or call.broken):
            return False
        if not self._calls.open:
            self._behind_mark += call.raw
            self._give_up(said)
        elif call.done:
            self._calls.end(said)
            self._state = "list"
        else:
            self._calls.open = False
            self._state = "content"
        return True

    def _read_name(self, said: Said) -> bool:
        at = self._waiting.find("{")
        if at < 0:
            return False
        name = self._waiting[:at].partition(ARGUMENTS)[0].partition(CALL_ID)[0].strip()
        if not name or any(character in _SPACE for character in name):
            self._give_up(said)
            return True
        self._calls.begin(name, said)
        self._waiting = self._waiting[at:]
        self._behind_mark = ""
        self._state, self._value = "arguments", JsonValue()
        return True

    def _read_arguments(self, said: Said) -> bool:
        end = self._value.push(self._waiting, 0)
        self._calls.go_on(self._waiting[:end], said)
        self._waiting = self._waiting[end:]
        if not (self._value.done or self._value.broken):
            return False
        self._calls.open = False
        self._state = "content"
        return True

    def _give_up(self, said: Said) -> None:
        """What stands behind the mark is no call."""
        self._content.add(self._behind_mark, said)
        self._behind_mark, self._state = "", "content"

    def _skip_space(self) -> None:
        waiting = self._waiting.lstrip(_SPACE)
        if self._behind_mark:
            self._behind_mark += self._waiting[: len(self._waiting) - len(waiting)]
        self._waiting = waiting
