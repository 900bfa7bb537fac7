"""An engine's process, started before it is known what it is to serve.

Its interpreter and its own imports take as long as finding that out does. It needs nothing heavier than
this, so that it can be the first thing that a handler does.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import NamedTuple

from runtime import marks

_package_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Spawned(NamedTuple):
    """The process, and this end of its socket. It ends when that is closed."""

    process: subprocess.Popen[bytes]
    socket: socket.socket


def spawn(
    device: str, further: dict[str, str] | None = None, listener: socket.socket | None = None
) -> Spawned:
    """Start a process that waits for its `EngineConfig`, with `further` variables in its environment.

    `device` is the one that it will be asked for, which it begins to look for: auto, cuda or cpu. `listener`
    is what the other ranks come to, for the one that they meet at.
    """
    path = [_package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        **marks.environment(),
        "PYTHONPATH": os.pathsep.join(path),
        **(further or {}),
    }
    ours, theirs = socket.socketpair()
    inherited = {"--fd": theirs.fileno()}
    if listener is not None:
        inherited["--listener"] = listener.fileno()
    arguments = [str(part) for pair in (*inherited.items(), ("--device", device)) for part in pair]
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "runtime.engine", *arguments],
            pass_fds=list(inherited.values()),
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    return Spawned(process, ours)
