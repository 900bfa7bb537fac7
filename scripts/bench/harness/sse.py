"""What a streamed answer said and when, from bytes recorded as they arrived.

Nothing is parsed while a stream runs: the client must not be what is measured. `Recording` keeps each
piece with its time; `read` takes it apart afterwards.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

DONE = b"data: [DONE]"


class Recording:
    """The bytes of one HTTP answer with the times (CLOCK_MONOTONIC, in seconds) at which they came.

    To be made just before the request is sent: `sent` is that moment.
    """

    def __init__(self) -> None:
        self.sent = time.monotonic()
        self.pieces: list[tuple[float, bytes]] = []
        self._tail = b""
        self.ended = False

    def add(self, data: bytes) -> None:
        self.pieces.append((time.monotonic(), data))
        recent = self._tail + data
        self.ended = self.ended or DONE in recent
        self._tail = recent[-len(DONE) :]


@dataclass
class Answer:
    """One streamed answer. Times are CLOCK_MONOTONIC seconds; counts are the server's own (`usage`)."""

    sent: float = 0.0
    status: int = 0
    error: str | None = None
    text: str = ""
    times: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int = 0
    complete: bool = False

    @property
    def first(self) -> float:
        """When the first token came."""
        return self.times[0]

    @property
    def last(self) -> float:
        """When the last token came."""
        return self.times[-1]


class _Body:
    """Takes the head off an HTTP/1.1 answer and undoes chunked transfer coding (RFC 9112, 7.1)."""

    def __init__(self) -> None:
        self.status = 0
        self._buffer = b""
        self._chunked = False
        self._left = 0
        self._in_head = True

    def feed(self, data: bytes) -> bytes:
        self._buffer += data
        if self._in_head and not self._take_head():
            return b""
        if not self._chunked:
            body, self._buffer = self._buffer, b""
            return body
        return b"".join(iter(self._next_part, b""))

    def _take_head(self) -> bool:
        head, end, rest = self._buffer.partition(b"\r\n\r\n")
        if not end:
            return False
        self.status = int(head.split(b" ", 2)[1])
        self._chunked = b"transfer-encoding: chunked" in head.lower()
        self._in_head, self._buffer = False, rest
        return True

    def _next_part(self) -> bytes:
        """The next piece of body in the buffer; empty when more bytes must come first."""
        if self._left == 0:
            # The line end after the previous chunk's data may stand in front of the next size.
            size, end, rest = self._buffer.removeprefix(b"\r\n").partition(b"\r\n")
            if not end or not size:
                return b""
            self._left, self._buffer = int(size.partition(b";")[0], 16), rest
        part, self._buffer = self._buffer[: self._left], self._buffer[self._left :]
        self._left -= len(part)
        return part


def read(recording: Recording) -> Answer:
    """The answer in a recording. An error, in the status or in the stream, is put into `error`."""
    body, answer, rest = _Body(), Answer(sent=recording.sent), b""
    for moment, data in recording.pieces:
        rest += body.feed(data).replace(b"\r\n", b"\n")
        answer.status = body.status
        if body.status != 200:
            continue
        *events, rest = rest.split(b"\n\n")
        for event in events:
            _take_event(answer, moment, event)
    if answer.status != 200:
        answer.error = f"status {answer.status}: {rest[:500].decode(errors='replace')}"
    elif not answer.complete and answer.error is None:
        answer.error = "the stream ended without [DONE]"
    return answer


def _take_event(answer: Answer, moment: float, event: bytes) -> None:
    if not event.startswith(b"data: "):
        return  # a comment that keeps the connection alive
    if event == DONE:
        answer.complete = True
        return
    data: dict[str, Any] = json.loads(event[len(b"data: ") :])
    if "error" in data:
        answer.error = json.dumps(data["error"])
        return
    usage = data.get("usage")
    if usage:
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.completion_tokens = usage["completion_tokens"]
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    for choice in data.get("choices", ()):
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        text = choice["delta"].get("content") if "delta" in choice else choice["text"]
        answer.text += text or ""
        # The event that ends an answer may bring no token, unless it is the only one; a chat's first
        # event may bring a role alone. Any other event of a text completion stands for tokens.
        if text or ("text" in choice and not (choice.get("finish_reason") and answer.times)):
            answer.times.append(moment)
