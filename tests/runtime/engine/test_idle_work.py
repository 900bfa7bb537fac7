"""What is done when nobody asks for anything, and how soon; the clock is the test's own."""

from __future__ import annotations

import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.engine import idle_work
from runtime.engine.channel import Channel
from runtime.engine.idle_work import IdleWork
from runtime.protocol import Abort, Event, Mark, encode_frame

QUIET = idle_work._QUIET_S


class Stage:
    """An engine with so many graphs to capture and parts to read, and what happened, in order."""

    def __init__(self, graphs: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.done: list[object] = []
        self._left = {"graph": graphs, "part": parts}
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        runner = SimpleNamespace(use_idle_time=lambda: self._take("graph"))
        grammars = SimpleNamespace(read_ahead=lambda: self._take("part"))
        engine: Any = SimpleNamespace(runner=runner, grammars=grammars)
        self.work = IdleWork(engine, self._send)

    def _take(self, kind: str) -> bool:
        if not self._left[kind]:
            return False
        self._left[kind] -= 1
        self.done.append(kind)
        return True

    def _send(self, event: Event) -> None:
        assert isinstance(event, Mark)
        self.done.append(event.name)

    def advance(self, times: int) -> None:
        for _ in range(times):
            self.work.advance()


def test_nothing_is_done_before_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(1, 1, monkeypatch)
    stage.now += 100
    stage.advance(3)
    assert (stage.work.due_in, stage.done) == (None, [])


def test_graphs_come_at_once_and_grammars_after_some_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(2, 2, monkeypatch)
    stage.work.begin()
    assert stage.work.due_in == 0
    stage.advance(4)
    assert stage.done == ["graph", "graph", "graphs"]
    assert stage.work.due_in == QUIET
    stage.now += QUIET / 2
    stage.advance(1)
    stage.work.put_off()
    stage.now += QUIET / 2
    assert stage.work.due_in == QUIET / 2
    stage.advance(1)
    assert stage.done == ["graph", "graph", "graphs"]
    stage.now += QUIET / 2
    assert stage.work.due_in == 0
    stage.advance(3)
    assert stage.done == ["graph", "graph", "graphs", "part", "part"]
    assert stage.work.due_in is None


def test_without_graphs_there_is_no_mark_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(0, 1, monkeypatch)
    stage.work.begin()
    stage.advance(1)
    stage.now += QUIET
    stage.advance(2)
    assert stage.done == ["part"]


def test_a_channel_waits_as_long_as_it_is_told() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(ours)
        assert channel.receive(0) == channel.receive(0.01) == []
        theirs.sendall(encode_frame(Abort(["gone"])))
        assert channel.receive(60) == [Abort(["gone"])]
        channel.wake()
        assert channel.receive(None) == channel.receive(0) == []
