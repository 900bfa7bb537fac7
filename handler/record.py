"""What is told of one request once it is over: in the log, in the counters, in traces. Never its text."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

_KEY = "record"


@dataclass(slots=True)
class Record:
    """One request. Times are in seconds from `began`, which is on the clock of `time.perf_counter`.

    `status` is what the client was told, 499 if it left before; `error` is the code of what went wrong,
    also where a stream had begun with status 200. `queue` is the wait until the engine took the request
    up, `ttft` the time to the first token. `operation` is "chat" or "text_completion" for what generates,
    `asked` the sampling settings of such a request, and `id` is that of its answer.
    """

    request_id: str
    method: str
    path: str
    client: str | None
    headers: list[tuple[bytes, bytes]]
    began: float = field(default_factory=time.perf_counter)
    began_ns: int = field(default_factory=time.time_ns)
    seconds: float = 0.0
    status: int | None = None
    error: str | None = None
    operation: str | None = None
    id: str | None = None
    model: str | None = None
    stream: bool = False
    choices: int = 0
    asked: dict[str, Any] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    queue: float | None = None
    ttft: float | None = None

    @classmethod
    def begin(cls, scope: Scope) -> Record:
        """A record of the request that comes with `scope`, and put into it."""
        client = scope.get("client")
        record = cls(
            request_id=scope["request_id"],
            method=scope["method"],
            path=scope["path"],
            client=client[0] if client else None,
            headers=scope["headers"],
        )
        scope[_KEY] = record
        return record

    @classmethod
    def of(cls, scope: Scope) -> Record:
        """The record of a request."""
        record: Record = scope[_KEY]
        return record

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self.began
