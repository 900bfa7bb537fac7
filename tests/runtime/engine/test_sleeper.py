"""When a sleeper has something to do; the clock is the test's own. The rest: `runtime/test_sleep.py`."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.engine import canary, sleeper
from runtime.engine.sleeper import PARTS, Sleeper
from runtime.protocol import Sleep, Wake

LATER = sleeper._TIDY_AFTER_S


class Stage:
    """A sleeper whose memory notes what is done with it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.done: list[str] = []
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        for name in ("ask", "answer", "check"):
            monkeypatch.setattr(canary, name, lambda *arguments: None)
        memory: Any = SimpleNamespace(
            prepare=lambda *arguments: None,
            give_back=lambda level: self.done.append("given back"),
            tidy=lambda: self.done.append("tidied"),
            take_back=lambda: self.done.append("taken back"),
        )
        blocks = SimpleNamespace(forget_contents=lambda: None)
        engine: Any = SimpleNamespace(scheduler=SimpleNamespace(blocks=blocks))
        self.sleeper = Sleeper(engine, memory, lambda event: None)

    def fall_asleep(self) -> None:
        self.sleeper.take(Sleep(1))
        for _ in range(PARTS):
            self.sleeper.advance()
        assert self.sleeper.is_asleep


def test_memory_that_was_given_back_is_tidied_by_and_by(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)
    assert stage.sleeper.due_in is None
    stage.fall_asleep()
    began = stage.now
    for number, later in enumerate(LATER):
        assert stage.sleeper.due_in == pytest.approx(began + later - stage.now)
        stage.sleeper.advance()
        assert stage.done == ["given back", *["tidied"] * number]
        stage.now = began + later
        stage.sleeper.advance()
    assert stage.done == ["given back", *["tidied"] * len(LATER)]
    assert stage.sleeper.due_in is None


def test_who_wakes_has_nothing_left_to_tidy(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)
    stage.fall_asleep()
    stage.sleeper.take(Wake())
    stage.now += LATER[-1]
    stage.sleeper.finish_waking()
    stage.sleeper.advance()
    assert (stage.sleeper.due_in, stage.done) == (None, ["given back", "taken back"])
