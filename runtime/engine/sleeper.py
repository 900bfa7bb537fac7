"""Falling asleep and waking: when the engine's memory goes, and what its requests do meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from runtime.engine import canary
from runtime.engine.core import Engine
from runtime.engine.step import Launched
from runtime.protocol import Abort, Asleep, Awake, Command, Drain, Event, Sleep, SleepLevel, Submit, Wake

# Preparations are made in so many parts, with a look at what has arrived after each. The number is the
# same for every rank, so that ranks keep step.
PARTS = 128
# When the memory is tidied, in seconds after it was given back: once the device is through with it.
_TIDY_AFTER_S = (0.25, 1.0, 4.0)
# Ranks follow rank 0's clock, so a little before its time is time enough.
_EARLY_S = 0.05


class Memory(Protocol):
    """What of an engine's memory comes and goes: the loaded weights and, in these contexts, what is
    allocated as the engine is built."""

    def derived(self) -> AbstractContextManager[None]:
        """For what is made of weights and never changes afterwards."""
        ...

    def cache(self) -> AbstractContextManager[None]:
        """For what need not outlive a sleep."""
        ...

    def on_reload(self, work: Callable[[], object]) -> None:
        """What is to be done with loaded weights, and again whenever the loader has brought them anew."""
        ...

    def prepare(self, level: SleepLevel, part: int, parts: int) -> None:
        """Make part number `part` of `parts` of what has to be done while the memory is still there."""
        ...

    def give_back(self, level: SleepLevel) -> None:
        """Give the memory back; everything has been prepared. From level 1, go on to level 2."""
        ...

    def tidy(self) -> None:
        """Some time after the memory was given back, do what `take_back` would have to do first."""
        ...

    def take_back(self) -> None:
        """Take the memory again, at the same addresses, with the weights in it.

        They may still be on their way. Steps that are launched from here on are computed when all are there.
        """
        ...


class Sleeper:
    """One engine's sleep. All commands to an engine pass here."""

    def __init__(self, engine: Engine, memory: Memory, send: Callable[[Event], None]) -> None:
        self._level: SleepLevel | None = None
        self._engine = engine
        self._memory = memory
        self._send = send
        self._canary = canary.answer(canary.ask(engine))
        # The question after a wake that is not answered yet, and when that wake began.
        self._asked: tuple[Launched, float] | None = None
        self._wanted: Sleep | None = None
        self._part = 0
        self._tidy_at: list[float] = []
        self._held: list[Submit] = []

    @property
    def is_asleep(self) -> bool:
        """Whether the engine is without its memory."""
        return self._level is not None

    @property
    def is_waking(self) -> bool:
        """Whether `finish_waking` has something to wait for."""
        return self._asked is not None

    @property
    def is_falling_asleep(self) -> bool:
        """Whether `advance` has something to do as soon as the engine has nothing."""
        return self._wanted is not None

    @property
    def due_in(self) -> float | None:
        """How many seconds from now a sleeper has something for `advance` to do; None for never."""
        return max(0.0, self._tidy_at[0] - time.monotonic()) if self._tidy_at else None

    def take(self, command: Command) -> None:
        """Do as one is told; requests go on to the engine. Raises `FirstlightError` if it cannot wake.

        After this comes `finish_waking`, with at most one step in between.
        """
        match command:
            case Submit():
                self._submit(command)
            case Abort():
                self._abort(command)
            case Sleep():
                self._fall_asleep(command)
            case Wake():
                self._wake()
            case Drain():
                self._stay_awake()

    def _submit(self, request: Submit) -> None:
        """Pass a request on to the engine, which is woken for it if need be."""
        if self._wanted is not None and not self._wanted.when_idle:
            self._held.append(request)
            return
        self._wanted = None
        if self._level is not None:
            self._wake()
        self._engine.submit(request)

    def _abort(self, command: Abort) -> None:
        """Forget these requests, wherever they are."""
        self._held = [request for request in self._held if request.request_id not in command.request_ids]
        self._engine.abort(command.request_ids)

    def _fall_asleep(self, command: Sleep) -> None:
        """Begin to fall asleep, which `advance` goes on with."""
        if self._level is not None:
            if command.level > self._level:
                self._memory.give_back(command.level)
                self._level = command.level
            self._send(Asleep(self._level))
        elif self._wanted is None or not command.when_idle:
            self._wanted, self._part = command, 0

    def advance(self) -> None:
        """Do a little of what is to be done before the memory can go, and in the end let it go; or tidy."""
        if self._wanted is None:
            if self._tidy_at and self._tidy_at[0] - time.monotonic() <= _EARLY_S:
                del self._tidy_at[0]
                self._memory.tidy()
            return
        level = self._wanted.level
        self._memory.prepare(level, self._part, PARTS)
        self._part += 1
        if self._part < PARTS:
            return
        self._engine.scheduler.blocks.forget_contents()
        self._memory.give_back(level)
        self._level, self._wanted = level, None
        self._tidy_at = [time.monotonic() + later for later in _TIDY_AFTER_S]
        self._send(Asleep(level))
        if self._held:
            self._wake()

    def _wake(self) -> None:
        """Begin to take the memory back, which `finish_waking` ends; or give up falling asleep."""
        if self.is_asleep:
            began = time.monotonic()
            self._memory.take_back()
            self._level = None
            self._tidy_at.clear()
            self._asked = canary.ask(self._engine), began
        elif not self.is_waking:
            self._send(Awake(0.0))
        self._stay_awake()

    def finish_waking(self) -> None:
        """Be awake, or find out that one is not: nothing that was launched since may be told before.

        Returns at once unless there was a wake. Raises `CanaryError` if weights were damaged.
        """
        if self._asked is not None:
            asked, began = self._asked
            canary.check(asked, self._canary)
            self._asked = None
            self._send(Awake(time.monotonic() - began))

    def _stay_awake(self) -> None:
        """Give up falling asleep, and let those on who wait for that."""
        self._wanted = None
        held, self._held = self._held, []
        for request in held:
            self._engine.submit(request)
