"""Falling asleep, and ending, when nobody has come for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from handler.service import Service

# How late the end of a spell of idleness may be noticed.
_LATE_SECONDS = 0.25


async def watch(service: Service, end: Callable[[], None]) -> None:
    """For ever: let an engine that is idle for `idle_sleep_s` doze off; after `idle_exit_s`, call `end`.

    Time that the engine spends loading or waking does not count.
    """
    client, settings, activity = service.client, service.settings, service.activity
    limits = [limit for limit in (settings.idle_sleep_s, settings.idle_exit_s) if limit]
    if not limits:
        return
    while True:
        await asyncio.sleep(min(_LATE_SECONDS, *limits))
        if client.state in ("loading", "waking"):
            activity.restart()
        idle = activity.idle_seconds()
        if settings.idle_exit_s and idle >= settings.idle_exit_s:
            end()
            return
        if settings.idle_sleep_s and idle >= settings.idle_sleep_s:
            client.doze_off(level=1)
