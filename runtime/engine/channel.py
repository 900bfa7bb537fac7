"""The engine's end of the socket to its handler."""

from __future__ import annotations

import select
import socket
import threading

from runtime.protocol import Command, Event, FrameReader, decode_command, encode_frame

_READ_BYTES = 1 << 18


class Channel:
    """Reads commands when asked, writes events from any thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._frames = FrameReader()
        self._lock = threading.Lock()

    def send(self, event: Event) -> None:
        """Write one event. Raises `OSError` when the handler is gone."""
        frame = encode_frame(event)
        with self._lock:
            self._socket.sendall(frame)

    def check(self, fingerprint: int) -> None:
        """One process is always of one mind; see `engine/turns.py`."""

    def receive(self, wait: bool) -> list[Command]:
        """The commands that have arrived; with `wait`, at least one. Raises `EOFError` without a handler."""
        if not wait and not select.select([self._socket], [], [], 0)[0]:
            return []
        commands: list[Command] = []
        while not commands:
            data = self._socket.recv(_READ_BYTES)
            if not data:
                raise EOFError
            commands = [decode_command(body) for body in self._frames.feed(data)]
            if not wait:
                break
        return commands
