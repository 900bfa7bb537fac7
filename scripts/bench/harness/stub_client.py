"""The handler's end of the stub engine."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from runtime.catalogue import ModelSpec
from runtime.client import EngineClient
from runtime.protocol import EngineConfig

_ROOT = Path(__file__).resolve().parents[3]


class StubClient(EngineClient):
    """Starts a `stub_engine` in place of the engine, with `step_ms` between its tokens."""

    def __init__(self, folder: Path, step_ms: float) -> None:
        super().__init__(EngineConfig(model=ModelSpec(id="stub", source=str(folder)), cache_dir=""))
        self._arguments = [str(folder), str(step_ms)]

    def spawn(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "scripts.bench.harness.stub_engine"),
                    *(str(theirs.fileno()), *self._arguments),
                ],
                cwd=_ROOT,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._socket = ours
        self._set_state("loading")
