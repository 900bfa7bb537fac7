"""A stand-in for the Hugging Face Hub that speaks its protocol to the genuine client.

    with HubServer() as hub:
        commit = hub.add_repo("org/name", {"config.json": b"{}"})      # or a folder's path
        monkeypatch.setenv("HF_ENDPOINT", hub.url)

Weights are served as the Hub serves LFS files: by a redirect to another host ("localhost" instead of
"127.0.0.1"), to which no token may go. Every request is recorded; faults are injected with `fail`.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

_DRIP_S = 0.3

Lie = Literal["elsewhere", "unlabelled", "longer", "shorter", "size"]


def lying_range(lie: Lie | None, start: int, end: int, size: int) -> tuple[int, int, str | None]:
    """What a server sends that was asked for [start, end): the range, and the Content-Range header.

    elsewhere: a range further on, and it says so. unlabelled: the right one, without saying which.
    longer, shorter: another end, and it says so. size: the right one, of a file of another size.
    """
    middle = (start + end) // 2
    start = middle if lie == "elsewhere" else start
    end = {"longer": size, "shorter": middle}.get(lie or "", end)
    total = size + 1 if lie == "size" else size
    return start, end, None if lie == "unlabelled" else f"bytes {start}-{end - 1}/{total}"


def reset(connection: socket.socket) -> None:
    """End a connection with a reset instead of an orderly close."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@dataclass
class Request:
    """One request that came in; `sent` counts the bytes of its body that went out."""

    method: str
    path: str
    host: str
    range: str | None
    authorization: str | None
    proxy_authorization: str | None
    client: tuple[str, int]
    sent: int = 0


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose path contains `match`.

    `before` is called before anything of the answer is made up. `status` answers with that status and
    `headers`; `cut_after` closes the connection after so many bytes of the body, `reset_after` resets it;
    `corrupt` flips a bit of the byte `corrupt_at`; `ignore_range` answers 200 with the whole file; `lie`
    is what a 206 answer gets wrong, see `lying_range`; `pause` is called after `pause_after` bytes of the
    body, and the rest goes out when it returns; until `drips_until` is set, what follows those comes byte
    by byte, so that nobody gives it up.
    """

    match: str
    times: int = 1
    before: Callable[[], object] | None = None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    reset_after: int | None = None
    corrupt: bool = False
    corrupt_at: int = 0
    ignore_range: bool = False
    lie: Lie | None = None
    pause: Callable[[], object] | None = None
    pause_after: int = 0
    drips_until: threading.Event | None = None


@dataclass
class Repo:
    """One repository: commits with their files, and the refs that point at them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    token: str | None = None


class HubServer:
    """The stand-in, serving on a free port of the loopback interface while it is entered."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        # How many files one page of a listing has.
        self.page_size = 1000
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _QuietServer(("127.0.0.1", 0), handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | Path,
        *,
        ref: str = "main",
        gated: bool = False,
        token: str | None = None,
    ) -> str:
        """Commit files (a mapping, or a folder) to a repository; the commit that `ref` now names."""
        if isinstance(files, Path):
            root = files
            files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        listing = "".join(f"{name} {git_sha1(content)}\n" for name, content in sorted(files.items()))
        commit = hashlib.sha1(listing.encode()).hexdigest()
        repo = self.repos.setdefault(repo_id, Repo())
        repo.commits[commit] = dict(files)
        repo.refs[ref] = commit
        repo.gated, repo.token = gated, token
        return commit

    def fail(self, match: str, **fault: Any) -> None:
        """Inject a fault: see `Fault`."""
        self._faults.append(Fault(match, **fault))

    def mend(self) -> None:
        """Take back all faults that have not happened yet."""
        self._faults.clear()

    def body_bytes(self, match: str = "/") -> int:
        """How many bytes of bodies went out for paths that contain `match`."""
        return sum(request.sent for request in self.requests if match in request.path)

    def take_fault(self, path: str) -> Fault | None:
        """The fault that the request for this path meets, counted down."""
        with self._lock:
            for fault in self._faults:
                if fault.match in path and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None


def git_sha1(content: bytes) -> str:
    """The id that git gives a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    # Connections that a test cuts, or that a killed client drops, are no news.
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.record = Request(
            self.command,
            path,
            self.headers.get("Host", ""),
            self.headers.get("Range"),
            self.headers.get("Authorization"),
            self.headers.get("Proxy-Authorization"),
            self.client_address,
        )
        self.hub.requests.append(self.record)
        self.fault = self.hub.take_fault(path)
        if self.fault and self.fault.before:
            self.fault.before()
        if self.fault and self.fault.status:
            self._send(self.fault.status, b"", self.fault.headers)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            self._revision(*found.groups())
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._tree(*found.groups())
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*found.groups())
        elif found := re.fullmatch(r"/storage/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path):
            repo_id, commit, name = found.groups()
            self._content(self.hub.repos[repo_id].commits[commit][name], {})
        else:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _repo(self, repo_id: str) -> Repo | None:
        """The repository, unless it is missing or closed to this request; then it is answered."""
        repo = self.hub.repos.get(repo_id)
        allowed = repo is not None and (
            repo.token is None or self.record.authorization == f"Bearer {repo.token}"
        )
        if repo is None or (not allowed and not repo.gated):
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        if not allowed:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
            return None
        return repo

    def _commit(self, repo: Repo, revision: str) -> str | None:
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit

    def _revision(self, repo_id: str, revision: str) -> None:
        # A gated repository's description is public; its files are not.
        gated = repo_id in self.hub.repos and self.hub.repos[repo_id].gated
        repo = self.hub.repos[repo_id] if gated else self._repo(repo_id)
        if repo is None or (commit := self._commit(repo, revision)) is None:
            return
        siblings = [{"rfilename": name} for name in repo.commits[commit]]
        self._json(
            {
                "id": repo_id,
                "sha": commit,
                "siblings": siblings,
                "private": False,
                "gated": "manual" if repo.gated else False,
                "tags": [],
            }
        )

    def _tree(self, repo_id: str, revision: str) -> None:
        repo = self.hub.repos[repo_id]
        if (commit := self._commit(repo, revision)) is None:
            return
        items: list[dict[str, Any]] = []
        for name, content in repo.commits[commit].items():
            item = {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
            if _is_lfs(name):
                digest = hashlib.sha256(content).hexdigest()
                item["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
            items.append(item)
        at = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        end = at + self.hub.page_size
        headers = {"Content-Type": "application/json"}
        if end < len(items):
            path = f"/api/models/{repo_id}/tree/{revision}"
            headers["Link"] = f'<{self.hub.url}{path}?cursor={end}>; rel="next"'
        self._send(200, json.dumps(items[at:end]).encode(), headers)

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        repo = self._repo(repo_id)
        if repo is None or (commit := self._commit(repo, revision)) is None:
            return
        content = repo.commits[commit].get(name)
        if content is None:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_sha1(content)}"'}
        if _is_lfs(name):
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(content))
            headers["Location"] = f"http://localhost:{self.hub.port}/storage/{repo_id}/{commit}/{name}"
            self._send(302, b"", headers)
        else:
            self._content(content, headers)

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        if self.fault and self.fault.corrupt:
            at = self.fault.corrupt_at
            content = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.record.range or "")
        if wanted is None or (self.fault and self.fault.ignore_range):
            self._send(200, content, headers)
            return
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
        lie = self.fault.lie if self.fault else None
        start, end, label = lying_range(lie, start, end, len(content))
        if label:
            headers["Content-Range"] = label
        self._send(206, content[start:end], headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        fault = self.fault or Fault("")
        if fault.pause:
            self._write(body[: fault.pause_after])
            fault.pause()
            self._write(body[fault.pause_after :])
        elif fault.drips_until is not None:
            self._drip(body, fault.pause_after, fault.drips_until)
        elif fault.cut_after is not None:
            self._write(body[: fault.cut_after])
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif fault.reset_after is not None:
            self._write(body[: fault.reset_after])
            reset(self.connection)
            self.close_connection = True
        else:
            self._write(body)

    def _drip(self, body: bytes, at: int, until: threading.Event) -> None:
        self._write(body[:at])
        while not until.wait(_DRIP_S):
            self._write(body[at : at + 1])
            at += 1
        self._write(body[at:])

    def _write(self, data: bytes) -> None:
        for at in range(0, len(data), 1 << 16):
            block = data[at : at + (1 << 16)]
            self.wfile.write(block)
            self.record.sent += len(block)


def _is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))
