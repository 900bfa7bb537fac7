"""Falling asleep, and ending, when nobody has come for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from handler.service import Service

# How late the end of a spell of idleness may be noticed.
_LATE_SECONDS = 0.25


async def watch(services: Sequence[Service], end: Callable[[], None]) -> None:
    """For ever: let engines that are idle for their `idle_sleep_s` doze off.

    When all are idle for the first one's `idle_exit_s`, call `end`. Time that an engine spends loading or
    waking does not count.
    """
    exit_s = services[0].settings.idle_exit_s
    limits = [limit for limit in (exit_s, *(s.settings.idle_sleep_s for s in services)) if limit]
    if not limits:
        return
    while True:
        await asyncio.sleep(min(_LATE_SECONDS, *limits))
        for service in services:
            if service.client.state in ("loading", "waking"):
                service.activity.restart()
            sleep_s = service.settings.idle_sleep_s
            if sleep_s and service.activity.idle_seconds() >= sleep_s:
                service.client.doze_off(level=1)
        if exit_s and min(service.activity.idle_seconds() for service in services) >= exit_s:
            end()
            return
