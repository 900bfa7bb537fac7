"""Ends a rank that would wait for ever: for a rank that is gone, or in a step that does not end.

A sum over all ranks waits for all of them, on a GPU where no error can reach it. So a thread watches the
lines to the other ranks, and the time that a step takes.
"""

from __future__ import annotations

import faulthandler
import os
import select
import sys
import threading
import time
from collections.abc import Callable

from runtime.parallel.ranks import Ranks

_INTERVAL_S = 1.0
# Whoever started the ranks sees as well that one is gone, knows why, and ends the others.
_GRACE_S = 2.0


class Watchdog(threading.Thread):
    """Watches from when the ranks have met. `give_up` is told why just before the process ends."""

    def __init__(self, ranks: Ranks, stuck_after_s: float, give_up: Callable[[str], None]) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._ranks = ranks
        self._stuck_after_s = stuck_after_s
        self._give_up = give_up
        self._working_since: float | None = None

    def work(self) -> None:
        """A turn begins."""
        self._working_since = time.monotonic()

    def rest(self) -> None:
        """The turn is over."""
        self._working_since = None

    def run(self) -> None:
        """The thread's work."""
        self._ranks.met.wait()
        poll = select.poll()
        ranks = {}
        for place, line in enumerate(self._ranks.lines):
            ranks[line.socket.fileno()] = 0 if self._ranks.rank else place + 1
            poll.register(line.socket, select.POLLRDHUP)
        interval_s = min(_INTERVAL_S, self._stuck_after_s / 4)
        while True:
            gone = [ranks[descriptor] for descriptor, _ in poll.poll(interval_s * 1e3)]
            if gone:
                time.sleep(_GRACE_S)
                self._end(f"Rank {gone[0]} of the engine is gone.")
            since = self._working_since
            if since is not None and time.monotonic() - since > self._stuck_after_s:
                faulthandler.dump_traceback(sys.stderr)
                self._end(
                    f"A step has taken longer than {self._stuck_after_s:g} s: one of the ranks is stopped, "
                    "or its device or the link to it hangs."
                )

    def _end(self, why: str) -> None:
        self._give_up(why)
        sys.stderr.flush()
        os._exit(1)
