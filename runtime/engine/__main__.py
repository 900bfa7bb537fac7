"""One rank of an engine: `python -m runtime.engine --fd N [--listener M]`.

`runtime.spawn` starts it with its end of a socket, N, on which it is first told what to serve. Rank 0 has
M, what the others come to, only if it was opened for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys

from runtime.engine.channel import Channel
from runtime.engine.pace import hurry, settle
from runtime.engine.start import start
from runtime.engine.turns import FollowingChannel, LeadingChannel
from runtime.engine.verification import WrongWeights
from runtime.engine.watchdog import Watchdog
from runtime.errors import FirstlightError
from runtime.parallel.control import LostRank, Meeting
from runtime.parallel.ranks import Ranks
from runtime.processes import TOKEN
from runtime.protocol import Broken, EngineConfig, Fatal, receive_config


def main(arguments: list[str]) -> int:
    """Serve what the other end of the socket says; returns the exit status."""
    hurry()
    descriptors = {name: int(number) for name, number in zip(arguments[::2], arguments[1::2], strict=True)}
    # Whoever stops the group stops the handler, and the handler drains its engine.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = socket.socket(fileno=descriptors["--fd"])
    config = receive_config(connection)
    if config is None:
        return 0  # nothing is to be served after all
    channel = Channel(connection)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        if config.world_size > 1:
            return _serve_as_rank(config, channel, descriptors.get("--listener"))
        return _serve(config, channel, channel, None)
    return 0


def _serve_as_rank(config: EngineConfig, channel: Channel, listener: int | None) -> int:
    """Serve in step with the other ranks; the exit status."""
    address, port, token = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", TOKEN))
    accepts = None if listener is None else socket.socket(fileno=listener)
    ranks = Ranks(config.rank, config.world_size, Meeting(address, int(port), token), accepts)
    watchdog = Watchdog(ranks, config.stuck_after_s, lambda why: _tell(channel, Broken(why)))
    watchdog.start()
    turns: LeadingChannel | FollowingChannel = FollowingChannel(ranks, watchdog)
    if config.rank == 0:
        turns = LeadingChannel(channel, ranks, watchdog)
    try:
        return _serve(config, channel, turns, ranks)
    except LostRank:
        if not ranks.met.is_set():
            return 1
        watchdog.join()  # it knows which
        return 1


def _serve(
    config: EngineConfig,
    channel: Channel,
    turns: Channel | LeadingChannel | FollowingChannel,
    ranks: Ranks | None,
) -> int:
    """Start, and serve what `turns` says until the end; the exit status."""
    try:
        engine, ready, sleeper, verification = start(config, turns.send, ranks)
    except WrongWeights as error:
        _tell(channel, Broken(str(error)))
        return 1
    except FirstlightError as error:
        _tell(channel, Fatal(str(error)))
        return 1
    from runtime.engine.loop import serve  # imports torch: not before `start` has done so in its own time

    turns.send(ready)
    if verification is not None:
        verification.begin(turns.send, lambda why: _tell(channel, Broken(why)))
    settle()
    try:
        serve(engine, sleeper, turns)
    except FirstlightError as error:
        print(f"firstlight: {error}", file=sys.stderr, flush=True)
        _tell(channel, Broken(str(error)))
        return 1
    if verification is not None:
        verification.join()  # what was answered has not ended before
    return 0


def _tell(channel: Channel, event: Fatal | Broken) -> None:
    """Say it to whoever started this process, if they are still there."""
    with contextlib.suppress(OSError):
        channel.send(event)
        channel.hang_up()


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Nothing is left that matters: skip the tear-down of torch, which takes longer than a hand-over may.
    os._exit(status)
