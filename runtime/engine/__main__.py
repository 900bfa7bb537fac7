"""The engine process: `python -m runtime.engine --fd N CONFIG`, started by `runtime.client`."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys

import msgspec

from runtime.engine.channel import Channel
from runtime.engine.start import start
from runtime.errors import FirstlightError
from runtime.protocol import Broken, EngineConfig, Fatal


def main(arguments: list[str]) -> int:
    """Serve the model of CONFIG (an `EngineConfig` in JSON) over the inherited socket N."""
    gc.disable()  # nothing that a start makes is garbage, and looking through it takes a tenth of an import
    flag, descriptor, config = arguments
    assert flag == "--fd"
    # Whoever stops the group stops the handler, and the handler drains its engine.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=int(descriptor)))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            engine, ready, sleeper = start(msgspec.json.decode(config, type=EngineConfig), channel.send)
        except FirstlightError as error:
            channel.send(Fatal(str(error)))
            channel.hang_up()
            return 1
        from runtime.engine.loop import serve  # imports torch: not before `start` has done so in its own time

        channel.send(ready)
        # What the start has made stays; from here on only what comes later needs to be looked through.
        gc.freeze()
        gc.enable()
        try:
            serve(engine, sleeper, channel)
        except FirstlightError as error:
            print(f"firstlight: {error}", file=sys.stderr, flush=True)
            channel.send(Broken(str(error)))
            channel.hang_up()
            return 1
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Nothing is left that matters: skip the tear-down of torch, which takes longer than a hand-over may.
    os._exit(status)
