"""How ranks keep step: they take the same commands before the same step, and see that it is the same step.

An engine's loop depends on nothing but what its channel tells it: which commands have arrived, and which
grammars are compiled. So rank 0, which the handler talks to, passes on what each of its calls returned, and
the same call returns the same on every other rank. After each step rank 0 compares everyone's fingerprints
of it, before anything of it is told to anyone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from runtime.engine.channel import Channel
from runtime.engine.grammar.compiling import Compiling
from runtime.engine.grammar.grammars import Grammars
from runtime.engine.watchdog import Watchdog
from runtime.parallel.control import ParallelError
from runtime.parallel.ranks import Ranks
from runtime.protocol import Command, Event, Submit, decode_commands, encode_commands

_FINGERPRINT_BYTES = 8


class DivergenceError(ParallelError):
    """The ranks of an engine no longer compute the same."""


class LeadingChannel:
    """Rank 0's: a `Channel` whose commands reach the followers, too."""

    def __init__(self, channel: Channel, ranks: Ranks, watchdog: Watchdog) -> None:
        self._channel = channel
        self._ranks = ranks
        self._watchdog = watchdog
        self._step = 0

    def send(self, event: Event) -> None:
        """See `Channel.send`."""
        self._channel.send(event)

    def receive(self, patience: float | None) -> list[Command]:
        """See `Channel.receive`."""
        self._watchdog.rest()
        commands = self._channel.receive(patience)
        self._watchdog.work()
        body = encode_commands(commands)
        for line in self._ranks.lines:
            line.send(body)
        return commands

    def compiling(self, grammars: Grammars) -> Compiling:
        """See `Channel.compiling`."""
        return _LeadingCompiling(grammars, self._channel.wake, self._ranks)

    def check(self, fingerprint: int) -> None:
        """Compare all ranks' fingerprints of the step. Raises `DivergenceError` when they differ."""
        self._step += 1
        for rank, line in enumerate(self._ranks.lines, 1):
            if int.from_bytes(line.receive(), "little", signed=True) != fingerprint:
                raise DivergenceError(
                    f"Rank {rank} computed another batch than rank 0 in step {self._step}: nothing of it is "
                    "answered."
                )


class _LeadingCompiling(Compiling):
    """Rank 0's, whose word on which grammars are faulty holds for all."""

    def __init__(self, grammars: Grammars, wake: Callable[[], None], ranks: Ranks) -> None:
        super().__init__(grammars, wake)
        self._ranks = ranks

    def finished(self) -> list[Submit]:
        """See `Compiling.finished`."""
        requests = super().finished()
        verdicts = []
        for request in requests:
            assert request.sampling.grammar is not None
            verdicts.append((request.request_id, self._grammars.verdict(request.sampling.grammar)))
        body = msgspec.msgpack.encode(verdicts)
        for line in self._ranks.lines:
            line.send(body)
        return requests


class FollowingCompiling:
    """A follower's `Compiling`: it compiles what rank 0 has compiled, when it is told to."""

    def __init__(self, grammars: Grammars, ranks: Ranks) -> None:
        self._grammars = grammars
        self._ranks = ranks
        self._pending: dict[str, Submit] = {}

    @property
    def busy(self) -> bool:
        """See `Compiling.busy`."""
        return bool(self._pending)

    def begin(self, request: Submit) -> None:
        """See `Compiling.begin`."""
        self._pending[request.request_id] = request

    def forget(self, request_ids: Iterable[str]) -> None:
        """See `Compiling.forget`."""
        for request_id in request_ids:
            self._pending.pop(request_id, None)

    def finished(self) -> list[Submit]:
        """What the same call returned on rank 0, as soon as this rank is so far, too."""
        body = self._ranks.lines[0].receive()
        requests = []
        for request_id, verdict in msgspec.msgpack.decode(body, type=list[tuple[str, str | None]]):
            request = self._pending.pop(request_id)
            assert request.sampling.grammar is not None
            self._grammars.settle(request.sampling.grammar, verdict)
            requests.append(request)
        return requests


class FollowingChannel:
    """A follower's: what rank 0 received, in the same order. Nobody is told anything."""

    def __init__(self, ranks: Ranks, watchdog: Watchdog) -> None:
        self._ranks = ranks
        self._watchdog = watchdog

    def send(self, event: Event) -> None:
        """Rank 0 sends it."""

    def receive(self, patience: float | None) -> list[Command]:
        """What the same call returned on rank 0."""
        self._watchdog.rest()
        commands = decode_commands(self._ranks.lines[0].receive())
        self._watchdog.work()
        return commands

    def compiling(self, grammars: Grammars) -> FollowingCompiling:
        """See `Channel.compiling`."""
        return FollowingCompiling(grammars, self._ranks)

    def check(self, fingerprint: int) -> None:
        """Let rank 0 compare."""
        self._ranks.lines[0].send(fingerprint.to_bytes(_FINGERPRINT_BYTES, "little", signed=True))
