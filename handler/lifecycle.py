"""Cold, loading, warm, asleep, draining, failed: what the health checks say, and the record of a start."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from runtime import marks
from runtime.client import EngineClient, EngineUnavailable

if TYPE_CHECKING:
    from handler.limits import Admission

# A start takes seconds to minutes; probes and clients need not come back sooner.
RETRY_LOADING_SECONDS = 2


def is_ready(client: EngineClient) -> bool:
    """Whether a request sent now is worked on now, by an engine that may have to be woken for it.

    One that died in its sleep is started by the request.
    """
    return client.state in ("warm", "asleep", "waking", "cold")


def percent(client: EngineClient) -> int | None:
    """How much of the present phase of loading is done; None when it is not known."""
    progress = client.progress
    if progress.bytes_total <= 0:
        return None
    return min(100, 100 * progress.bytes_done // progress.bytes_total)


def describe(client: EngineClient) -> str:
    """What a request waits for, in a few words: `loading 43%`."""
    if client.state == "warm":
        return "waiting"
    if client.state != "loading":
        return client.state
    words = {"download": "downloading", "convert": "converting", "load": "loading", "warmup": "warming up"}
    known = percent(client)
    return words[client.progress.phase] + (f" {known}%" if known is not None else "")


def health(client: EngineClient) -> dict[str, Any]:
    """The body of the readiness and startup checks."""
    body: dict[str, Any] = {"state": client.state}
    if client.sleep_level is not None:
        body["sleep_level"] = client.sleep_level
    if client.state == "loading":
        progress = msgspec.to_builtins(client.progress)
        progress.pop("directory", None)
        body["progress"] = {"bytes_done": 0, "bytes_total": 0, **progress, "percent": percent(client)}
    if client.failure is not None:
        body["error"] = client.failure
    return body


def status(client: EngineClient, model: str, admission: Admission) -> dict[str, Any]:
    """The body of /status. Sizes are in bytes, marks in seconds since the process was executed."""
    body = health(client)
    info = client.info
    body |= {
        "model": model,
        "marks": client.marks,
        "restarts": client.restarts,
        "sleep": {"sleeps": client.sleeps, "wakes": client.wakes, "wake_seconds": client.wake_seconds},
        "queue": {"waiting": admission.waiting, "limit": admission.max_queue, "in_flight": client.in_flight},
        "engine": msgspec.to_builtins(client.stats),
        "memory": None,
        "counters": info.counters if info else {},
    }
    if info is not None:
        body["memory"] = {
            "weight_bytes": info.weight_bytes,
            "kv_blocks_used": client.stats.blocks_used,
            "kv_blocks_total": info.num_blocks,
            "kv_tokens_total": info.num_blocks * info.block_size,
        }
        body |= {"device": info.device, "dtype": info.dtype, "max_model_len": info.max_model_len}
    return body


async def report_start(client: EngineClient, admission: Admission) -> None:
    """Write the start's line to stderr: after the first token if someone waits for it, else when ready."""
    info = None
    while info is None:
        try:
            info = await client.wait_ready()
            await client.wait_verified()
        except EngineUnavailable:
            info = None
            if client.state in ("failed", "draining"):
                return
    client.marks.setdefault("ready", marks.since_exec())
    await admission.settled.wait()
    line = {"event": "start", "marks": client.marks, **info.counters}
    print(json.dumps(line), file=sys.stderr, flush=True)


def note_first_token(client: EngineClient) -> None:
    """Mark the first token of this process, unless it is marked already."""
    if "first_token" not in client.marks:
        client.marks["first_token"] = marks.since_exec()


async def wait_failure(client: EngineClient) -> str:
    """Wait until the engine has failed for good, and return why."""
    while client.state != "failed":
        await asyncio.sleep(0.2)
    return client.failure or "The engine cannot start."
