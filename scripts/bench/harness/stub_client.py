"""The handler's end of the stub engine."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from runtime.catalogue import ModelSpec
from runtime.client import EngineClient
from runtime.processes import EngineProcess
from runtime.protocol import EngineConfig

_ROOT = Path(__file__).resolve().parents[3]


class StubProcess(EngineProcess):
    """A `stub_engine` in place of an engine's process."""

    def __init__(self, folder: Path, step_ms: float) -> None:
        self.rank = 0
        self.socket, theirs = socket.socketpair()
        module = "scripts.bench.harness.stub_engine"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), str(folder), str(step_ms)],
                cwd=_ROOT,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self.pid = self._process.pid


class StubClient(EngineClient):
    """Starts a stub in place of the engine, with `step_ms` between its tokens."""

    def __init__(self, folder: Path, step_ms: float) -> None:
        super().__init__(EngineConfig(model=ModelSpec(id="stub", source=str(folder)), cache_dir=""))
        self._folder = folder
        self._step_ms = step_ms

    def spawn(self) -> None:
        self._ranks = [StubProcess(self._folder, self._step_ms)]
        self._set_state("loading")
