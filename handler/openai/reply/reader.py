"""Reads one reply: reasoning first, then calls in what remains."""

from __future__ import annotations

from handler.openai.reply.reasoning import Reasoning
from handler.openai.reply.said import CallReader, Said


class ReplyReader:
    """Reads one reply in pieces. Without `parallel` only the first call counts; the model said more."""

    def __init__(
        self, reasoning: Reasoning | None, calls: CallReader | None, *, parallel: bool = True
    ) -> None:
        self._reasoning = reasoning
        self._calls = calls
        self._parallel = parallel

    @property
    def can_reason(self) -> bool:
        """Whether reasoning is looked for."""
        return self._reasoning is not None

    @property
    def reasons(self) -> bool:
        """Whether the reply is still in its reasoning."""
        return self._reasoning is not None and self._reasoning.open

    def push(self, text: str) -> Said:
        """Take in the next piece and return what is now certain."""
        reasoning = ""
        if self._reasoning is not None:
            reasoning, text = self._reasoning.push(text)
        return self._joined(reasoning, text, last=False)

    def flush(self) -> Said:
        """What was held back; the reply has ended."""
        reasoning, text = self._reasoning.flush() if self._reasoning is not None else ("", "")
        return self._joined(reasoning, text, last=True)

    def _joined(self, reasoning: str, text: str, *, last: bool) -> Said:
        if self._calls is None:
            return Said(reasoning=reasoning, content=text)
        said = self._calls.push(text)
        if last:
            rest = self._calls.flush()
            said.content += rest.content
            for delta in rest.calls:
                said.call(delta)
        if not self._parallel:
            said.calls = [delta for delta in said.calls if delta.index == 0]
        said.reasoning = reasoning
        return said
