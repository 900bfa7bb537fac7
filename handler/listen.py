"""The listening socket, opened before anything heavy is imported."""

from __future__ import annotations

import os
import socket

from runtime.errors import FirstlightError

BACKLOG = 2048


class ListenError(FirstlightError):
    """The address cannot be listened on."""


def listen(host: str, port: int) -> socket.socket:
    """A TCP socket that accepts connections from now on; whoever connects waits until it is served."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ListenError(f"--host {host}: no such address ({error.strerror})") from None
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ListenError(
            f"cannot listen on {host} port {port}: {reason}; choose another with --port (0 takes a free one)"
        ) from None
    sock.setblocking(False)
    return sock


def url_of(sock: socket.socket) -> str:
    """The address of a listening socket as a browser takes it."""
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
