"""Says on stderr how far the start has come: one line that changes on a terminal, a few lines in a log."""

from __future__ import annotations

import asyncio
import sys
import time

from handler.lifecycle import describe
from runtime.client import EngineClient
from runtime.weights.sources.progress import FetchProgress, Meter

_CLEAR = "\r\x1b[K"
_PERIOD_SECONDS = 0.1
_LOG_PERIOD_SECONDS = 10.0


class ProgressLine:
    """Shows the phase of loading until the engine is ready or has failed."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._shown = ""
        self._terminal = sys.stderr.isatty()
        self._meter = Meter("firstlight", bar=self._terminal)
        self._written_at = time.monotonic()

    async def show(self) -> None:
        """Tell until the end, also when cancelled; a terminal's line is wiped off then."""
        try:
            while self._client.state in ("cold", "loading"):
                self._write(self._text())
                await asyncio.sleep(_PERIOD_SECONDS)
        finally:
            self._write("")
        if self._client.info is not None:
            seconds = self._client.marks.get("ready")
            when = f" after {seconds:.1f} s" if seconds is not None else ""
            print(f"firstlight: ready{when}, on {self._client.info.device}", file=sys.stderr, flush=True)

    def _text(self) -> str:
        progress = self._client.progress
        if progress.phase in ("download", "convert"):
            fetched = FetchProgress(
                bytes_done=progress.bytes_done, bytes_total=progress.bytes_total, phase=progress.phase
            )
            return self._meter.text(fetched)
        return f"firstlight: {describe(self._client)} …"

    def _write(self, text: str) -> None:
        if text == self._shown:
            return
        if self._terminal:
            sys.stderr.write(_CLEAR + text)
        elif text and time.monotonic() - self._written_at >= _LOG_PERIOD_SECONDS:
            self._written_at = time.monotonic()
            sys.stderr.write(text + "\n")
        else:
            return
        sys.stderr.flush()
        self._shown = text
