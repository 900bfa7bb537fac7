"""The engine's end of the socket to its handler."""

from __future__ import annotations

import os
import select
import socket
import threading

from runtime.engine.grammar.compiling import Compiling
from runtime.engine.grammar.grammars import Grammars
from runtime.protocol import Command, Event, FrameReader, decode_command, encode_frame

_READ_BYTES = 1 << 18


class Channel:
    """Reads commands when asked, writes events from any thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._frames = FrameReader()
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)

    def send(self, event: Event) -> None:
        """Write one event. Raises `OSError` when the handler is gone."""
        frame = encode_frame(event)
        with self._lock:
            self._socket.sendall(frame)

    def hang_up(self) -> None:
        """Let the other end read all that was sent, before this process ends.

        A socket that is closed with something unread in it takes what it has sent back.
        """
        self._socket.shutdown(socket.SHUT_WR)
        while self._socket.recv(_READ_BYTES):
            pass

    def wake(self) -> None:
        """Make `receive` return, on whatever thread it waits, or the next time it would."""
        os.eventfd_write(self._wake, 1)

    def check(self, fingerprint: int) -> None:
        """One process is always of one mind; see `engine/turns.py`."""

    def compiling(self, grammars: Grammars) -> Compiling:
        """What compiles the grammars of requests that come this way."""
        return Compiling(grammars, self.wake)

    def receive(self, patience: float | None) -> list[Command]:
        """The commands that have arrived, or will have before so many seconds are over.

        At least one if `patience` is None, unless `wake` is called. Raises `EOFError` without a handler.
        """
        commands: list[Command] = []
        woken = False
        while not commands:
            timeout = 0 if woken else patience
            readable, _, _ = select.select([self._socket.fileno(), self._wake], [], [], timeout)
            if self._wake in readable:
                os.eventfd_read(self._wake)
                woken = True
            if self._socket.fileno() in readable:
                data = self._socket.recv(_READ_BYTES)
                if not data:
                    raise EOFError
                commands = [decode_command(body) for body in self._frames.feed(data)]
            elif not woken or timeout == 0:
                break
        return commands
