"""One start of a server, seen from outside: when it listens, is ready, and streams its first token.

All times are seconds since just before the server was executed. The request is there from then on: it
is sent as soon as a connection is accepted, and again when the server refuses it because it is not ready.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field

from harness import BenchError, client
from harness.answers import Reference
from harness.contender import require_complete
from harness.process import ServerProcess
from harness.servers import Server
from harness.sse import Answer

_RETRY_SECONDS = 0.001
_POLL_SECONDS = 0.02
_READY_AFTER_ANSWER_SECONDS = 5.0
_NOT_YET = (404, 429, 503)


@dataclass(frozen=True)
class Start:
    """The times of one start; `marks` are the server's own, where it tells them."""

    listening: float
    ready: float
    first_token: float
    last_token: float
    marks: dict[str, float] = field(default_factory=dict)


def clock(server: Server, reference: Reference, tokens: int, timeout: float) -> Start:
    """Start a server, and stop it when it has answered. Raises BenchError if it answers wrongly."""
    request = client.completion_request(server.greedy(reference.prompt_token_ids, tokens))
    with server.start() as process, _Readiness(process, server.ready_path) as readiness:
        listening, answer = _first_answer(process, request, timeout)
        if answer.error is not None:
            raise BenchError(f"{server.name}: {answer.error}\n{process.log()}")
        require_complete(server.name, answer, len(reference.prompt_token_ids), tokens)
        reference.check_text(server.name, answer.text, tokens, server.lossy)
        return Start(
            listening=listening - process.t0,
            ready=readiness.wait(_READY_AFTER_ANSWER_SECONDS) - process.t0,
            first_token=answer.first - process.t0,
            last_token=answer.last - process.t0,
            marks=_marks(process),
        )


def _first_answer(process: ServerProcess, request: bytes, timeout: float) -> tuple[float, Answer]:
    """When the first connection was accepted, and the first answer that is not a refusal to wait."""
    listening: float | None = None
    while time.monotonic() - process.t0 < timeout:
        try:
            with client.connect(process.port, timeout) as connection:
                listening = listening or time.monotonic()
                answer = client.stream_on(connection, request)
            if answer.status not in _NOT_YET and answer.status != 0:
                return listening, answer
        except OSError:
            process.check_alive()
        time.sleep(_RETRY_SECONDS)
    raise BenchError(f"{process.name} streamed nothing within {timeout:.0f} s.\n{process.log()}")


class _Readiness:
    """Asks in the background, now and then, whether the server is ready."""

    def __init__(self, process: ServerProcess, path: str) -> None:
        self._process = process
        self._path = path
        self._left = threading.Event()
        self._ready: float | None = None
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._left.wait(_POLL_SECONDS):
            try:
                if client.get(self._process.port, self._path)[0] == 200:
                    self._ready = time.monotonic()
                    return
            except OSError:
                continue  # it does not listen yet

    def wait(self, timeout: float) -> float:
        """When it was ready, on CLOCK_MONOTONIC."""
        self._thread.join(timeout)
        if self._ready is None:
            raise BenchError(f"{self._process.name} has answered, but GET {self._path} is not 200")
        return self._ready

    def __enter__(self) -> _Readiness:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._left.set()
        self._thread.join()


def _marks(process: ServerProcess) -> dict[str, float]:
    """The start marks in /status; none if the server has no such thing."""
    try:
        status, body = client.get(process.port, "/status")
        marks: dict[str, float] = json.loads(body)["marks"] if status == 200 else {}
        return marks
    except (OSError, ValueError, KeyError, TypeError):
        return {}
