"""Who is being served now, and since when nobody is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Activity:
    """Requests count from their arrival until the last byte of their answer. What only asks how things
    are (health checks, metrics) does not come by here."""

    def __init__(self) -> None:
        self.busy = 0
        self._since = time.monotonic()

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request, for as long as it is here."""
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1
            self._since = time.monotonic()

    def idle_seconds(self) -> float:
        """How long nobody has been here; 0 while somebody is."""
        return 0.0 if self.busy else time.monotonic() - self._since

    def restart(self) -> None:
        """Count from now on, unless somebody is here."""
        self._since = time.monotonic()
