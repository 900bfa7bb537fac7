"""What an engine puts off until nobody asks it for anything."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from runtime import marks
from runtime.engine.core import Engine
from runtime.protocol import Event, Mark

# What the first grammar takes is read when nobody has asked for anything for so long: it takes some tenths of
# a second in which nothing else can be done, and whoever asks again soon shall not find those.
_QUIET_S = 2.0


class IdleWork:
    """First the graphs, and after a while what the first grammar takes; nothing before `begin`."""

    def __init__(self, engine: Engine, send: Callable[[Event], None]) -> None:
        self._engine = engine
        self._send = send
        self._left: Literal["graphs", "grammars"] | None = None
        self._captured: float | None = None
        self._asked = time.monotonic()

    def begin(self) -> None:
        """The first token is on its way."""
        self._left = "graphs"

    def put_off(self) -> None:
        """The engine has something to do."""
        self._asked = time.monotonic()

    @property
    def due_in(self) -> float | None:
        """How many seconds from now there is something for `advance` to do; None for never."""
        if self._left == "grammars":
            return max(0.0, self._asked + _QUIET_S - time.monotonic())
        return None if self._left is None else 0.0

    def advance(self) -> None:
        """Do a part of what is due, if anything is."""
        if self._left == "graphs":
            if self._engine.runner.use_idle_time():
                self._captured = marks.since_exec()
                return
            if self._captured is not None:
                self._send(Mark("graphs", self._captured))
            self._left = "grammars"
        elif self.due_in == 0 and not self._engine.grammars.read_ahead():
            self._left = None
