"""Calls between tags, with content around them: `<tool_call>{...}</tool_call>` and its like."""

from __future__ import annotations

from typing import Literal

from handler.openai.reply.json_call import CallWriter, JsonCall
from handler.openai.reply.said import Content, Said, held_back


class TaggedCalls:
    """Reads replies in which `begin` stands before each call and `end` behind it.

    What stands behind `begin` and is no call is content, tag included.
    """

    def __init__(self, begin: str, end: str) -> None:
        self._begin = begin
        self._end = end
        self._state: Literal["content", "call", "tail"] = "content"
        self._waiting = ""
        self._call = JsonCall()
        self._content = Content()
        self._calls = CallWriter()

    def push(self, text: str) -> Said:
        """See `CallReader`."""
        said = Said()
        self._waiting += text
        steps = {"content": self._read_content, "call": self._read_call, "tail": self._read_tail}
        while self._waiting and steps[self._state](said):
            pass
        return said

    def flush(self) -> Said:
        """See `CallReader`."""
        said = Said()
        if self._state == "call":
            self._cut_off(said)
        elif self._state == "content":
            self._content.add(self._waiting, said)
        self._waiting = ""
        self._content.end(said, after_calls=self._calls.count > 0)
        return said

    def _read_content(self, said: Said) -> bool:
        """Reads up to the next call; says whether there is one in what waits. Likewise those below."""
        at = self._waiting.find(self._begin)
        if at < 0:
            at = len(self._waiting) - held_back(self._waiting, (self._begin,))
            self._content.add(self._waiting[:at], said)
            self._waiting = self._waiting[at:]
            return False
        self._content.add(self._waiting[:at], said)
        self._waiting = self._waiting[at + len(self._begin) :]
        self._state, self._call = "call", JsonCall()
        return True

    def _read_call(self, said: Said) -> bool:
        call = self._call
        self._waiting = self._waiting[call.push(self._waiting) :]
        if call.begins or (call.done and call.name is not None):
            self._calls.write(call, said)
        if not (call.done or call.broken):
            return False
        self._cut_off(said)
        return True

    def _cut_off(self, said: Said) -> None:
        """The call's object ends here, whole or not."""
        if self._calls.open:
            if self._call.done:
                self._calls.end(said)
            self._calls.open = False
            self._state = "tail"
        else:
            self._content.add(self._begin + self._call.raw, said)
            self._state = "content"

    def _read_tail(self, said: Said) -> bool:
        tags = (self._end, self._begin)
        found = [(at, tag) for tag in tags if (at := self._waiting.find(tag)) >= 0]
        if not found:
            self._waiting = self._waiting[len(self._waiting) - held_back(self._waiting, tags) :]
            return False
        at, tag = min(found)
        # Where the end was forgotten, the next call begins.
        self._waiting = self._waiting[at + len(tag) if tag == self._end else at :]
        self._state = "content"
        return True
