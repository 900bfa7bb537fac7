"""The speed of a server: ranges read into memory and thrown away, by processes that do nothing else."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence

from harness import BenchError

_PROCESSES = 8
_RANGE_BYTES = 32 << 20
_READ_BYTES = 1 << 20


def seconds_to_read(port: int, paths: Sequence[str], sizes: Sequence[int]) -> float:
    """Seconds that it takes to read these files of a server on this host, whole, in parallel ranges.

    Raises BenchError if the server does not send what it should.
    """
    ranges = [
        (path, start, min(start + _RANGE_BYTES, size))
        for path, size in zip(paths, sizes, strict=True)
        for start in range(0, size, _RANGE_BYTES)
    ]
    began = time.monotonic()
    children = []
    for number in range(_PROCESSES):
        if (child := os.fork()) == 0:
            # Whatever happens here must not go on in a copy of the benchmark.
            try:
                _read(port, ranges[number::_PROCESSES])
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        raise BenchError(f"the server on port {port} does not send all ranges of {paths}")
    return time.monotonic() - began


def _read(port: int, ranges: Sequence[tuple[str, int, int]]) -> None:
    buffer = bytearray(_READ_BYTES)
    with socket.create_connection(("127.0.0.1", port)) as connection, connection.makefile("rb") as body:
        for path, start, stop in ranges:
            head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nRange: bytes={start}-{stop - 1}\r\n\r\n"
            connection.sendall(head.encode())
            if b" 206 " not in body.readline():
                raise ConnectionError
            while body.readline().strip():
                pass
            left = stop - start
            while left:
                count = body.readinto(memoryview(buffer)[: min(left, _READ_BYTES)])
                if not count:
                    raise ConnectionError
                left -= count
