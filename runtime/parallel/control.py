"""The lines between the ranks of one engine: a socket from each follower to rank 0, the leader.

Everything that ranks must agree on goes over these lines in one order: facts of the start, and then, turn by
turn, what the leader was told by its handler. Messages are MessagePack in frames (`runtime/protocol.py`).
Nothing here needs torch, so that ranks meet while it is being imported.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
import time
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from runtime.errors import FirstlightError
from runtime.protocol import FrameReader, frame

_READ_BYTES = 1 << 16
_CONNECT_SECONDS = 300.0
_RETRY_SECONDS = 0.05

T = TypeVar("T")


class ParallelError(FirstlightError):
    """The ranks of an engine cannot meet, or no longer agree."""


class LostRank(Exception):
    """The other end of a line is gone: its process ended."""


class _Hello(msgspec.Struct, array_like=True):
    token: str
    rank: int
    world_size: int


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of one engine meet, and the secret by which they know each other."""

    address: str
    port: int
    token: str

    @property
    def local(self) -> bool:
        """Whether all ranks are on one host, so that no address but loopback is needed."""
        return ipaddress.ip_address(socket.gethostbyname(self.address)).is_loopback


class Line:
    """Both ways between the leader and one follower, message by message."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._frames = FrameReader()
        self._waiting: list[bytes] = []

    def send(self, body: bytes) -> None:
        """Raises `LostRank` when the other end is gone."""
        try:
            self.socket.sendall(frame(body))
        except OSError:
            raise LostRank from None

    def receive(self) -> bytes:
        """The next message, waiting for it. Raises `LostRank` when none can come any more."""
        while not self._waiting:
            try:
                data = self.socket.recv(_READ_BYTES)
            except OSError:
                raise LostRank from None
            if not data:
                raise LostRank
            self._waiting = self._frames.feed(data)
        return self._waiting.pop(0)


class Control:
    """One rank's lines: the leader has one to each follower, in the order of ranks, a follower one."""

    def __init__(self, rank: int, lines: list[Line]) -> None:
        self.rank = rank
        self.lines = lines

    def exchange(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank. All must call this, in the same order."""
        if self.rank == 0:
            values = [
                value,
                *(msgspec.msgpack.decode(line.receive(), type=type(value)) for line in self.lines),
            ]
            body = msgspec.msgpack.encode(values)
            for line in self.lines:
                line.send(body)
            return values
        (line,) = self.lines
        line.send(msgspec.msgpack.encode(value))
        answer: Any = msgspec.msgpack.decode(line.receive(), type=list[type(value)])  # type: ignore[misc]
        found: list[T] = answer
        return found

    def close(self) -> None:
        """Hang up; the other ranks take it for the end of this one."""
        for line in self.lines:
            line.socket.close()


def listen(address: str, port: int = 0) -> socket.socket:
    """What the leader accepts its followers on; port 0 is any free one."""
    return socket.create_server((address, port), backlog=64)


def lead(listener: socket.socket, meeting: Meeting, world_size: int) -> Control:
    """The leader's side: wait for all followers. Who does not know the token is sent away."""
    lines: dict[int, Line] = {}
    listener.settimeout(_CONNECT_SECONDS)
    while len(lines) < world_size - 1:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            missing = [rank for rank in range(1, world_size) if rank not in lines]
            raise ParallelError(
                f"Ranks {missing} did not come to {meeting.address}:{meeting.port} "
                f"within {_CONNECT_SECONDS:.0f} s."
            ) from None
        connection.settimeout(5.0)
        line = Line(connection)
        hello = _hello(line)
        if hello is None or not hmac.compare_digest(hello.token, meeting.token):
            connection.close()
            continue
        if hello.world_size != world_size or not 0 < hello.rank < world_size or hello.rank in lines:
            raise ParallelError(
                f"A process came as rank {hello.rank} of {hello.world_size} to an engine of {world_size} "
                "ranks: --tensor-parallel-size and the launcher must say the same everywhere."
            )
        connection.settimeout(None)
        lines[hello.rank] = line
    return Control(0, [lines[rank] for rank in sorted(lines)])


def _hello(line: Line) -> _Hello | None:
    try:
        return msgspec.msgpack.decode(line.receive(), type=_Hello)
    except (LostRank, ValueError):
        return None


def follow(meeting: Meeting, rank: int, world_size: int) -> Control:
    """A follower's side: go to the leader, which may not be up yet."""
    deadline = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            connection = socket.create_connection((meeting.address, meeting.port), timeout=5.0)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise ParallelError(
                    f"Rank {rank} cannot reach rank 0 at {meeting.address}:{meeting.port}: {error}."
                ) from None
            time.sleep(_RETRY_SECONDS)
    connection.settimeout(None)
    line = Line(connection)
    line.send(msgspec.msgpack.encode(_Hello(meeting.token, rank, world_size)))
    return Control(rank, [line])
