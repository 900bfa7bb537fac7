"""`firstlight serve` as its users have it: a process of its own with a real engine."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]


class Served:
    """A running `firstlight serve`; `log` grows with what it writes to stderr."""

    def __init__(self, *flags: str) -> None:
        environment = {**os.environ, "FIRSTLIGHT_PORT": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "handler", "serve", *flags],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line

    @property
    def url(self) -> str:
        """Where it listens; waits until it says so."""
        found = until(lambda: re.search(r"http://\S+", self.log))
        return str(found[0])

    @property
    def engine(self) -> psutil.Process:
        """The engine's process."""
        (engine,) = psutil.Process(self.process.pid).children()
        return engine

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)

    def get(self, path: str) -> Any:
        connection = self.connect()
        connection.request("GET", path)
        answer = json.loads(connection.getresponse().read())
        connection.close()
        return answer

    def post(self, path: str, **body: Any) -> http.client.HTTPConnection:
        """A connection on which a request was sent; the test reads the answer or leaves."""
        connection = self.connect()
        connection.request("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return connection

    def wait(self) -> int:
        """The exit status, once it has one and all of `log` is there."""
        status = self.process.wait(60)
        self._reader.join()
        return status


def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """What `condition` returns once it is true; a test that waits in vain fails."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)
    return value


@contextmanager
def served(*flags: str) -> Iterator[Served]:
    server = Served(*flags)
    try:
        yield server
    finally:
        server.process.terminate()
        try:
            server.process.wait(20)
        finally:
            server.process.kill()
            server.wait()
