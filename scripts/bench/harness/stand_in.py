"""A Hub and an S3 server in one, over a model's folder, as fast as the machine's loopback allows.

    python scripts/bench/harness/stand_in.py PORT FOLDER

The weights go out by `sendfile`, from several processes. The Hub's repository is `bench/model`; its weights
come, as from the real one, by a redirect to another host, which is `localhost` here. S3's address is
`s3://bench/model`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

REPOSITORY = "bench/model"
BUCKET, PREFIX = "bench", "model/"
_COMMIT = "0123456789abcdef" * 2 + "01234567"
_PROCESSES = 6
_SEND_BYTES = 8 << 20


class StandIn:
    """What is served; `answer` is called in a thread for every connection."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self._port = port
        self._sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self._digests = dict(zip(self._sizes, pool.map(self._sha256, self._sizes), strict=True))
        self._files = {name: os.open(folder / name, os.O_RDONLY) for name in self._sizes}

    def _sha256(self, name: str) -> str:
        with open(self._folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def answer(self, connection: socket.socket) -> None:
        """Serve one connection's requests, one after the other, until it is closed."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, connection.makefile("rb") as lines:
            while first := lines.readline():
                headers = {}
                while line := lines.readline().strip():
                    name, _, value = line.decode("latin-1").partition(":")
                    headers[name.lower()] = value.strip()
                method, target, _ = first.decode("latin-1").split()
                try:
                    self._answer(connection, method, target, headers)
                except (BrokenPipeError, ConnectionResetError):
                    return

    def _answer(self, connection: socket.socket, method: str, target: str, headers: dict[str, str]) -> None:
        parts = urlsplit(target)
        path = unquote(parts.path)
        if path == f"/api/models/{REPOSITORY}/revision/main":
            siblings = [{"rfilename": name} for name in self._sizes]
            _send(connection, 200, json.dumps({"id": REPOSITORY, "sha": _COMMIT, "siblings": siblings}))
        elif path == f"/api/models/{REPOSITORY}/tree/{_COMMIT}":
            _send(connection, 200, json.dumps([self._listed(name) for name in self._sizes]))
        elif found := re.fullmatch(f"/{REPOSITORY}/resolve/{_COMMIT}/(.+)", path):
            self._resolve(connection, method, found[1], headers)
        elif path.rstrip("/") == f"/{BUCKET}":
            _send(connection, 200, self._listing(parse_qs(parts.query)))
        elif path.removeprefix(f"/{BUCKET}/{PREFIX}") in self._sizes:
            self._send_file(connection, method, path.removeprefix(f"/{BUCKET}/{PREFIX}"), headers)
        else:
            _send(connection, 404, "<Error><Code>NoSuchKey</Code></Error>")

    def _resolve(self, connection: socket.socket, method: str, name: str, headers: dict[str, str]) -> None:
        fields = {"X-Repo-Commit": _COMMIT}
        if _is_lfs(name):
            fields["Location"] = f"http://localhost:{self._port}/{BUCKET}/{PREFIX}{name}"
            fields["X-Linked-Etag"] = f'"{self._digests[name]}"'
            fields["X-Linked-Size"] = str(self._sizes[name])
            _send(connection, 302, "", fields)
        else:
            self._send_file(connection, method, name, headers, fields)

    def _listed(self, name: str) -> dict[str, object]:
        entry: dict[str, object] = {"type": "file", "path": name, "size": self._sizes[name]}
        content = (self._folder / name).read_bytes() if not _is_lfs(name) else b""
        entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if _is_lfs(name):
            entry["lfs"] = {"oid": self._digests[name], "size": self._sizes[name], "pointerSize": 134}
        return entry

    def _listing(self, query: dict[str, list[str]]) -> str:
        rows = "".join(
            f"<Contents><Key>{escape(PREFIX + name)}</Key><Size>{size}</Size>"
            f"<ETag>&quot;{self._digests[name][:32]}&quot;</ETag></Contents>"
            for name, size in self._sizes.items()
            if (PREFIX + name).startswith(query.get("prefix", [""])[0])
        )
        return (
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>false</IsTruncated>'
            f"{rows}</ListBucketResult>"
        )

    def _send_file(
        self,
        connection: socket.socket,
        method: str,
        name: str,
        headers: dict[str, str],
        fields: Mapping[str, str] = {},
    ) -> None:
        size = self._sizes[name]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", ""))
        start, stop = (int(wanted[1]), min(int(wanted[2]) + 1, size)) if wanted else (0, size)
        etag = f'"{self._digests[name][:32]}"'
        fields = {"ETag": etag, "Content-Length": str(stop - start), **fields}
        if wanted:
            fields["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        _head(connection, 206 if wanted else 200, fields)
        while method == "GET" and start < stop:
            start += os.sendfile(
                connection.fileno(), self._files[name], start, min(_SEND_BYTES, stop - start)
            )


def _send(connection: socket.socket, status: int, body: str, headers: dict[str, str] | None = None) -> None:
    data = body.encode()
    _head(connection, status, {"Content-Length": str(len(data)), **(headers or {})})
    connection.sendall(data)


def _head(connection: socket.socket, status: int, headers: dict[str, str]) -> None:
    lines = [f"HTTP/1.1 {status} .", *(f"{name}: {value}" for name, value in headers.items())]
    connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())


def _is_lfs(name: str) -> bool:
    return name.endswith(".safetensors")


def main(port: int, folder: Path) -> None:
    """Serve until a signal ends it, and its processes with it."""
    # Both names of the loopback interface are meant, and `localhost` may mean the other protocol first.
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=256)
    stand_in = StandIn(folder, port)
    children = []
    for _ in range(_PROCESSES):
        if (child := os.fork()) == 0:
            while True:
                threading.Thread(target=stand_in.answer, args=(listener.accept()[0],), daemon=True).start()
        children.append(child)
    signal.signal(signal.SIGTERM, lambda number, frame: [os.kill(child, number) for child in children])
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
