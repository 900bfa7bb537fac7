"""When to try again: how often, and how long to wait before."""

from __future__ import annotations

import random

# This many tries in a row without a single new byte, then the other end is to blame.
MAX_FRUITLESS_TRIES = 6
FIRST_DELAY_S = 0.5
MAX_DELAY_S = 60.0


def delay_s(tries: int, retry_after: float | None) -> float:
    """Seconds to wait after the `tries`-th fruitless try; what the server asks for is respected.

    Random, so that many connections refused at once do not come back at once.
    """
    delay = FIRST_DELAY_S * 2.0 ** (tries - 1) * random.uniform(0.5, 1.0)
    return min(max(delay, retry_after or 0.0), MAX_DELAY_S)
