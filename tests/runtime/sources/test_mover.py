"""Bytes of answers moved into files, in C and in Python: the same bytes, and the same ends."""

from __future__ import annotations

import os
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import urllib3

from runtime.weights.sources import mover
from runtime.weights.sources.mover import Body
from tests.runtime.sources.hub_server import reset

CONTENT = os.urandom(3_000_000)


class _Handler(BaseHTTPRequestHandler):
    """Sends CONTENT; the path says what goes wrong."""

    protocol_version = "HTTP/1.1"
    connections: set[object]
    released: threading.Event

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.connections.add(self.client_address)
        self.send_response(200)
        if self.path == "/chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for at in range(0, len(CONTENT), 70_000):
                part = CONTENT[at : at + 70_000]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.write(b"0\r\n\r\n")
            return
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:1_000_000])
        self.close_connection = self.path != "/"
        if self.path == "/stalls":
            self.released.wait(30)
        elif self.path == "/resets":
            reset(self.connection)
        elif self.path != "/ends":
            self.wfile.write(CONTENT[1_000_000:])


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    state = {"connections": set(), "released": threading.Event()}
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), state)) as server:
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        state["released"].set()  # type: ignore[attr-defined]
        server.shutdown()


@pytest.fixture(params=["C", "Python"])
def moves_in_c(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "Python":
        monkeypatch.setattr(mover, "library", lambda: None)
    else:
        assert mover.library() is not None or _built()
    return bool(request.param == "C")


def _built() -> bool:
    mover._build(mover._LIBRARY.cached("any"))
    mover.library.cache_clear()
    return mover.library() is not None


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


@contextmanager
def get(server: ThreadingHTTPServer, path: str, pool: urllib3.PoolManager | None = None) -> Iterator[Body]:
    response = (pool or urllib3.PoolManager()).request(
        "GET",
        f"http://127.0.0.1:{server.server_port}{path}",
        preload_content=False,
        decode_content=False,
        timeout=1,
    )
    try:
        yield Body(response, 0.2)
    finally:
        response.close()


def move_all(body: Body, file: int, count: int = 700_000) -> int:
    done = 0
    while moved := body.move(file, done, count):
        done += moved
    return done


@pytest.mark.parametrize("path", ["/", "/chunked"])
def test_every_byte_gets_to_its_place(
    server: ThreadingHTTPServer, moves_in_c: bool, file: int, path: str
) -> None:
    with get(server, path) as body:
        assert move_all(body, file) == len(CONTENT)
    assert os.pread(file, len(CONTENT) + 1, 0) == CONTENT


def test_most_bytes_are_moved_in_c(
    server: ThreadingHTTPServer, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mover.library() is not None or _built()
    in_python: list[int] = []
    genuine: Callable[..., int] = Body._move_in_python
    monkeypatch.setattr(Body, "_move_in_python", lambda *a: in_python.append(moved := genuine(*a)) or moved)
    with get(server, "/") as body:
        move_all(body, file)
    assert sum(in_python) < 20_000


def test_the_connection_is_used_again(server: ThreadingHTTPServer, moves_in_c: bool, file: int) -> None:
    pool = urllib3.PoolManager()
    for _ in range(3):
        with get(server, "/", pool) as body:
            done = 0
            while done < len(CONTENT):
                done += body.move(file, done, len(CONTENT) - done)
    assert len(server.RequestHandlerClass.connections) == 1  # type: ignore[attr-defined]


def test_what_came_before_a_cut_is_kept(server: ThreadingHTTPServer, moves_in_c: bool, file: int) -> None:
    with get(server, "/ends") as body:
        done = 0
        with pytest.raises((EOFError, urllib3.exceptions.HTTPError)):
            while moved := body.move(file, done, 300_000):
                done += moved
            raise EOFError
    assert done == 1_000_000
    assert os.pread(file, done, 0) == CONTENT[:done]


@pytest.mark.parametrize("path", ["/stalls", "/resets"])
def test_a_connection_that_fails_is_said_to(
    server: ThreadingHTTPServer, moves_in_c: bool, file: int, path: str
) -> None:
    with get(server, path) as body, pytest.raises((OSError, urllib3.exceptions.HTTPError)) as caught:
        move_all(body, file, 300_000)
    assert isinstance(caught.value, urllib3.exceptions.HTTPError | ConnectionError | TimeoutError)


def test_a_wait_can_be_ended_by_another_thread(
    server: ThreadingHTTPServer, moves_in_c: bool, file: int
) -> None:
    response = urllib3.PoolManager().request(
        "GET",
        f"http://127.0.0.1:{server.server_port}/stalls",
        preload_content=False,
        decode_content=False,
        timeout=1000,
    )
    body = Body(response, 1000)
    ending = threading.Timer(0.5, body.hang_up)
    ending.start()
    with pytest.raises((EOFError, OSError, urllib3.exceptions.HTTPError)):
        move_all(body, file)
        raise EOFError
    ending.join()
    response.close()


def test_a_file_that_cannot_be_written_is_no_fault_of_the_connection(
    server: ThreadingHTTPServer, moves_in_c: bool, tmp_path: Path
) -> None:
    (tmp_path / "read only").touch()
    descriptor = os.open(tmp_path / "read only", os.O_RDONLY)
    with get(server, "/") as body, pytest.raises(OSError, match="Bad file descriptor") as caught:
        move_all(body, descriptor)
    assert not isinstance(caught.value, ConnectionError | TimeoutError)
    os.close(descriptor)


def test_an_encrypted_connection_is_left_to_python(
    server: ThreadingHTTPServer, file: int, tmp_path: Path
) -> None:
    certificate, key = tmp_path / "certificate", tmp_path / "key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-keyout", key, "-out", certificate, "-addext", "subjectAltName=DNS:localhost"],
        check=True,
        capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    response = urllib3.PoolManager(ca_certs=str(certificate)).request(
        "GET",
        f"https://localhost:{server.server_port}/",
        preload_content=False,
        decode_content=False,
        timeout=5,
    )
    assert move_all(Body(response, 5), file) == len(CONTENT)
    assert os.pread(file, len(CONTENT), 0) == CONTENT
