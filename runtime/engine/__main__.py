"""One rank of an engine: `python -m runtime.engine --fd N [--listener M] [--device auto|cuda|cpu]`.

`runtime.spawn` starts it with its end of a socket, N, on which it is first told what to serve. Rank 0 has
M, what the others come to, only if it was opened for it. The device is named if that much is known already.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from runtime.engine.gpu.finding import FindingDevice
from runtime.engine.pace import hurry


def main(arguments: list[str]) -> int:
    """Serve what the other end of the socket says; returns the exit status."""
    hurry()
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    # Whoever stops the group stops the handler, and the handler drains its engine.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    device = FindingDevice()
    if options.get("--device", "cpu") != "cpu":
        device.start()
    from runtime.engine.process import run  # takes a while, in which the device's context is being made

    listener = options.get("--listener")
    connection = socket.socket(fileno=int(options["--fd"]))
    return run(connection, None if listener is None else int(listener), device)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Nothing is left that matters: skip the tear-down of torch, which takes longer than a hand-over may.
    os._exit(status)
