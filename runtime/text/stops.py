"""Stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Cuts a growing text at the first place where one of the stop strings ends.

    Whatever the pieces, the outcome is the same: the stop that is complete first wins, and of those
    complete at the same character the one that begins first. With `include_stop` the emitted text
    ends with the stop string, otherwise before it.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        if not all(stops):
            raise ValueError("an empty stop string would stop every text before it begins")
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, str | None]:
        """Take in the next piece: the text that is safe to emit, and the stop string that was found.

        Once a stop has been found, all further text is dropped.
        """
        if self._stopped:
            return "", None
        if not self._stops:
            return text, None
        text = self._held + text
        found = min(
            ((at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0),
            default=None,
        )
        if found is not None:
            end, at, stop = found
            self._stopped, self._held = True, ""
            return text[: end if self._include_stop else at], stop
        keep = self._pending(text)
        self._held = text[keep:]
        return text[:keep], None

    def flush(self) -> str:
        """The text held back because it might have begun a stop string; the text has ended."""
        text, self._held = self._held, ""
        return text

    def _pending(self, text: str) -> int:
        """Where the longest suffix begins that a stop string could still complete."""
        first = max(0, len(text) - self._longest + 1)
        for at in range(first, len(text)):
            if any(stop.startswith(text[at:]) for stop in self._stops):
                return at
        return len(text)
