"""A server as a process of its own, from just before its execution to its certain end."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness import ROOT, BenchError, client

_END_SECONDS = 20.0


def rank_devices(rank: int, world_size: int) -> dict[str, str]:
    """For the environment of one rank: its own GPU first, then those that it shares memory with."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(n) for n in range(world_size)] if visible is None else visible.split(",")[:world_size]
    return {"CUDA_VISIBLE_DEVICES": ",".join([devices[rank], *devices[:rank], *devices[rank + 1 :]])}


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ServerProcess:
    """A running server with everything it started; `t0` is the moment just before its execution."""

    def __init__(
        self, name: str, command: Sequence[str], port: int, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.port = port
        self._command = command
        # Not in a pipe: nobody reads it while the server is measured, and a full pipe would stop it.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self.t0 = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def check_alive(self) -> None:
        """Raise BenchError with the end of its log if the server has ended."""
        status = self._process.poll()
        if status is not None:
            raise BenchError(
                f"{self.name} ended with status {status}.\n$ {shlex.join(self._command)}\n{self.log()}"
            )

    def wait_ready(self, path: str, timeout: float) -> float:
        """Seconds from `t0` until GET `path` answers 200. Raises BenchError if it does not come to that."""
        while time.monotonic() - self.t0 < timeout:
            self.check_alive()
            try:
                if client.get(self.port, path)[0] == 200:
                    return time.monotonic() - self.t0
            except OSError:
                pass
            time.sleep(0.05)
        raise BenchError(f"{self.name} was not ready after {timeout:.0f} s.\n{self.log()}")

    def log(self, size: int = 4000) -> str:
        """The last `size` bytes of what it wrote."""
        self._log.flush()
        end = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, max(0, end - size)).decode(errors="replace")

    def stop(self) -> None:
        """End it and everything it started, politely first."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                os.killpg(self.pid, how)
                try:
                    self._process.wait(_END_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # what outlived its leader
        self._log.close()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found.extend(map(int, task.read_text().split()))
            except OSError:
                continue  # it has ended in between
    return found
