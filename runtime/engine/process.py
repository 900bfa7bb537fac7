"""An engine's process: from what it is told on its socket until the end."""

from __future__ import annotations

import contextlib
import os
import socket
import sys

from runtime.engine.channel import Channel
from runtime.engine.gpu.finding import FindingDevice
from runtime.engine.pace import settle
from runtime.engine.start import start
from runtime.engine.turns import FollowingChannel, LeadingChannel
from runtime.engine.verification import WrongWeights
from runtime.engine.watchdog import Watchdog
from runtime.errors import FirstlightError
from runtime.parallel.control import LostRank, Meeting
from runtime.parallel.ranks import Ranks
from runtime.processes import TOKEN
from runtime.protocol import Broken, EngineConfig, Fatal, receive_config


def run(connection: socket.socket, listener: int | None, device: FindingDevice) -> int:
    """Serve what the other end of the socket says; the exit status.

    `listener` is the descriptor of what the other ranks come to, for the one that they meet at.
    """
    config = receive_config(connection)
    if config is None:
        return 0  # nothing is to be served after all
    channel = Channel(connection)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        if config.world_size > 1:
            return _serve_as_rank(config, channel, listener, device)
        return _serve(config, channel, channel, None, device)
    return 0


def _serve_as_rank(
    config: EngineConfig, channel: Channel, listener: int | None, device: FindingDevice
) -> int:
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
        return _serve(config, channel, turns, ranks, device)
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
    device: FindingDevice,
) -> int:
    """Start, and serve what `turns` says until the end; the exit status."""
    try:
        engine, ready, sleeper, verification = start(config, turns.send, ranks, device)
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
