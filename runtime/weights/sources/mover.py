"""Bytes of an HTTP answer -> a file, with as little done in Python as can be.

python -m runtime.weights.sources.mover          build what is in C ahead of time, for this machine
python -m runtime.weights.sources.mover image    build it next to `native/`, for an image

The C part takes over where a connection is neither encrypted nor read in chunks. What is not built yet is
built beside the first downloads, which do without it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import socket
import sys
import threading
from contextlib import suppress
from ctypes import byref, c_int, c_int64
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.compiled import CannotCompile, Library

if TYPE_CHECKING:
    import urllib3

_READ_BYTES = 256 << 10
_LIBRARY = Library(
    "mover",
    Path(__file__).with_name("native"),
    flags=("-std=gnu11", "-O2", "-fPIC", "-fvisibility=hidden"),
    link=("-shared",),
)
_CONNECTION_FAILED, _FILE_FAILED = 2, 3


class Body:
    """The body of one answer, to be moved into a file piece by piece."""

    def __init__(self, response: urllib3.BaseHTTPResponse, timeout_s: float) -> None:
        self._response = response
        self._timeout_ms = int(timeout_s * 1000)
        self._library = library()
        self._original, self._connection = _bare_connection(response)
        # What the HTTP library has read of the body, along with its head or because it was asked.
        self._ahead = 0 if self._connection is None else len(self._original.fp.peek())
        self._failure: OSError | None = None

    def move(self, file: int, offset: int, count: int) -> int:
        """Write at most `count` of the next bytes at `offset` of an open file; how many, 0 at the end.

        Raises urllib3's HTTPError, ConnectionError and TimeoutError for the connection, and other OSErrors
        for the file.
        """
        if self._failure is not None:
            raise self._failure
        if self._connection is None or self._library is None:
            return self._move_in_python(file, offset, min(count, _READ_BYTES))
        if self._original.isclosed():
            return 0
        # The last byte is left to the HTTP library, which then knows that the connection is free again.
        bare = min(count, self._original.length - 1)
        if self._ahead or bare <= 0:
            moved = self._move_in_python(file, offset, min(count, self._ahead or 1))
            self._ahead = max(0, self._ahead - moved)
            return moved
        return self._move_in_c(file, offset, bare)

    def hang_up(self) -> None:
        """End a `move` that waits in another thread, as if the other end had closed the connection."""
        connection = getattr(getattr(self._response, "connection", None), "sock", None)
        if connection is not None:
            with suppress(OSError):  # it may be closed already
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def _move_in_python(self, file: int, offset: int, count: int) -> int:
        view = memoryview(self._response.read(count))
        done = 0
        while done < len(view):
            done += os.pwrite(file, view[done:], offset + done)
        return done

    def _move_in_c(self, file: int, offset: int, count: int) -> int:
        assert self._connection is not None
        assert self._library is not None
        state, code = c_int(), c_int()
        moved: int = self._library.mover_move(
            self._connection.fileno(), file, offset, count, self._timeout_ms, byref(state), byref(code)
        )
        self._original.length -= moved
        if state.value == _FILE_FAILED:
            raise OSError(code.value, os.strerror(code.value))
        if state.value == _CONNECTION_FAILED:
            self._failure = OSError(code.value, os.strerror(code.value))
            if not moved:
                raise self._failure
        return moved


def _bare_connection(response: urllib3.BaseHTTPResponse) -> tuple[Any, socket.socket | None]:
    """http.client's answer beneath, and its socket if nothing but the body's bytes come over that."""
    original: Any = getattr(response, "_original_response", None)
    connection = getattr(getattr(getattr(original, "fp", None), "raw", None), "_sock", None)
    # TLS has a class of its own.
    bare = type(connection) is socket.socket and not original.chunked and original.length is not None
    return original, connection if bare else None


@functools.cache
def library() -> ctypes.CDLL | None:
    """What is in C; None where it is not built, and then that is begun."""
    for path in (_LIBRARY.shipped("any"), _LIBRARY.cached("any")):
        if path.exists():
            loaded = ctypes.CDLL(str(path))
            loaded.mover_move.restype = c_int64
            loaded.mover_move.argtypes = [c_int, c_int, c_int64, c_int64, c_int, *[ctypes.c_void_p] * 2]
            return loaded
    threading.Thread(target=_build, args=(_LIBRARY.cached("any"),), daemon=True).start()
    return None


def _build(path: Path) -> None:
    try:
        _LIBRARY.compile(path)
    except CannotCompile as error:
        print(f"firstlight: {error}; downloads may be slower", file=sys.stderr)


if __name__ == "__main__":
    target = _LIBRARY.shipped("any") if sys.argv[1:] == ["image"] else _LIBRARY.cached("any")
    _build(target)
    print(target)
