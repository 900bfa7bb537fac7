"""Reasoning between tags at the beginning of a reply: `<think>...</think>` and its like."""

from __future__ import annotations

from typing import Literal

from handler.openai.reply.said import held_back


class Reasoning:
    """Parts a reply into reasoning and the rest.

    With `inside` the reply begins in the middle of the reasoning, because the prompt ended with `begin`.
    White space around the reasoning is left out.
    """

    def __init__(self, begin: str, end: str, *, inside: bool) -> None:
        self._begin = begin
        self._end = end
        self._state: Literal["start", "inside", "behind", "rest"] = "inside" if inside else "start"
        self._waiting = ""
        self._began = False

    @property
    def open(self) -> bool:
        """Whether the reasoning has begun and not ended."""
        return self._state == "inside"

    def push(self, text: str) -> tuple[str, str]:
        """Take in the next piece: the reasoning and the rest that are now certain."""
        self._waiting += text
        reasoning = rest = ""
        if self._state == "start":
            self._read_start()
        if self._state == "inside":
            reasoning = self._read_inside()
        if self._state == "behind":
            self._waiting = self._waiting.lstrip()
            self._state = "rest" if self._waiting else "behind"
        if self._state == "rest":
            rest, self._waiting = self._waiting, ""
        return reasoning, rest

    def flush(self) -> tuple[str, str]:
        """What was held back; the text has ended."""
        waiting, self._waiting = self._waiting, ""
        if self._state == "inside":
            return waiting.rstrip() if self._began else waiting.strip(), ""
        return "", waiting if self._state == "start" else ""

    def _read_start(self) -> None:
        visible = self._waiting.lstrip()
        if visible.startswith(self._begin):
            self._waiting = visible[len(self._begin) :]
            self._state = "inside"
        elif not self._begin.startswith(visible):
            self._state = "rest"

    def _read_inside(self) -> str:
        if not self._began:
            self._waiting = self._waiting.lstrip()
        at = self._waiting.find(self._end)
        if at >= 0:
            reasoning = self._waiting[:at].rstrip()
            self._waiting = self._waiting[at + len(self._end) :]
            self._state = "behind"
            return reasoning
        certain = self._waiting[: len(self._waiting) - held_back(self._waiting, (self._end,))].rstrip()
        self._waiting = self._waiting[len(certain) :]
        self._began = self._began or bool(certain)
        return certain
