"""One line on a terminal that says how far the start has come."""

from __future__ import annotations

import asyncio
import sys

from handler.lifecycle import describe
from runtime.client import EngineClient

_CLEAR = "\r\x1b[K"
_PERIOD_SECONDS = 0.1


class ProgressLine:
    """Shows the phase of loading until the engine is ready or has failed."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._shown = ""

    async def show(self) -> None:
        """Keep the line up to date, and wipe it off in the end, also when cancelled."""
        try:
            while self._client.state in ("cold", "loading"):
                self._write(f"firstlight: {describe(self._client)} …")
                await asyncio.sleep(_PERIOD_SECONDS)
        finally:
            self._write("")
        if self._client.info is not None:
            seconds = self._client.marks.get("ready")
            when = f" after {seconds:.1f} s" if seconds is not None else ""
            print(f"firstlight: ready{when}, on {self._client.info.device}", file=sys.stderr)

    def _write(self, text: str) -> None:
        if text != self._shown:
            sys.stderr.write(_CLEAR + text)
            sys.stderr.flush()
            self._shown = text
