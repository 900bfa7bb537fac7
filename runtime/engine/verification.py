"""Weights that are computed with before their digests are known: what is found out of them, and what follows.

A digest takes longer than everything else in a start, and is right nearly always. So the engine is ready as
soon as all bytes are on the device, and answers begin; whoever receives them lets none end before `verified`.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

from runtime import marks
from runtime.errors import FirstlightError
from runtime.protocol import Event, Mark
from runtime.weights.gate import OPEN
from runtime.weights.loader import MappedWeights
from runtime.weights.sources.arrival import Arrival
from runtime.weights.sources.cache import persist_meanwhile
from runtime.weights.sources.landing import Replaced
from runtime.weights.upload import DeviceWeights


class WrongWeights(FirstlightError):
    """What was loaded is not what it should be; the next start fetches it anew."""


class Verification:
    """Of the weights that were loaded while `arrival` brought them."""

    def __init__(self, arrival: Arrival, weights: MappedWeights | DeviceWeights) -> None:
        self._arrival = arrival
        self._weights = weights
        self._thread: threading.Thread | None = None

    def judge(self) -> None:
        """Wait until it is known. Raises `WrongWeights`, and what the fetch raised."""
        try:
            self._arrival.confirm()
        except Replaced as wrong:
            raise WrongWeights(
                f"{wrong} arrived with another content than the source's own digest promises."
            ) from wrong

    def begin(self, send: Callable[[Event], None], give_up: Callable[[str], None]) -> None:
        """Judge in a thread: `send` the mark, or be told to `give_up` just before the process ends."""
        self._thread = threading.Thread(
            target=self._run, args=(send, give_up), name="verification", daemon=True
        )
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread, and for the end of the fetch."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, send: Callable[[Event], None], give_up: Callable[[str], None]) -> None:
        try:
            self.judge()
        except FirstlightError as error:
            give_up(str(error))
            os._exit(1)
        self._weights.gate = OPEN
        send(Mark("verified", marks.since_exec()))
        try:
            self._arrival.end()
        except FirstlightError as error:
            # The model is here, but the cache has no note of that: the next start asks for it again.
            print(f"firstlight: {error}", file=sys.stderr, flush=True)
        else:
            persist_meanwhile(self._arrival.directory)
