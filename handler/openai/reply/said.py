"""What the readers of replies hand out, and what they have in common."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(slots=True)
class CallDelta:
    """A call that begins (`name` is set) or whose arguments go on. `arguments` is a piece of JSON text."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Said:
    """What a piece of a reply adds. Joined over all pieces, this is the whole reply."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)

    def call(self, delta: CallDelta) -> None:
        """Add a piece of a call, joined to the one before it where that is the same call's."""
        if self.calls and self.calls[-1].index == delta.index and delta.name is None:
            self.calls[-1].arguments += delta.arguments
        else:
            self.calls.append(delta)


class CallReader(Protocol):
    """Finds tool calls in a text that arrives in pieces."""

    def push(self, text: str) -> Said:
        """Take in the next piece and return what is now certain."""

    def flush(self) -> Said:
        """What was held back; the text has ended."""


class Content:
    """Text around calls. White space before and behind them belongs to the format, not to the content."""

    def __init__(self) -> None:
        self._space = ""

    def add(self, text: str, said: Said) -> None:
        """Text that is content; white space at its end waits for what follows."""
        visible = text.rstrip()
        if visible:
            said.content += self._space + visible
            self._space = ""
        self._space += text[len(visible) :]

    def end(self, said: Said, *, after_calls: bool) -> None:
        """The text has ended: what waits was content after all, unless there were calls."""
        if not after_calls:
            said.content += self._space
        self._space = ""


def held_back(text: str, tags: Iterable[str]) -> int:
    """How many characters at the end of `text` could be the beginning of one of `tags`."""
    longest = max((len(tag) for tag in tags), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(tag.startswith(text[-length:]) for tag in tags):
            return length
    return 0
