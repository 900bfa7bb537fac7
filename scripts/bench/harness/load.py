"""Many clients at once, in several processes, so that the client is not what is measured.

Every request is encoded beforehand, and what comes back is only recorded while the load runs; it is
taken apart when all is over.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Lock
from typing import Any

from harness import BenchError
from harness.sse import Answer, Recording, read

_READ_BYTES = 1 << 16
_LEAD_SECONDS = 0.2
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Job:
    """One request, head and body, and when it is due, in seconds from the beginning (None: when a
    client is free)."""

    request: bytes
    due: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a job. `asked` is when it was due or, if it was not, sent (CLOCK_MONOTONIC)."""

    asked: float
    answer: Answer


def poisson(count: int, rate: float, seed: int = 0) -> list[float]:
    """`count` times of arrival, in seconds, of independent clients that come at `rate` a second together."""
    draw = random.Random(seed)
    moment = 0.0
    times = []
    for _ in range(count):
        moment += draw.expovariate(rate)
        times.append(moment)
    return times


def run(port: int, jobs: Sequence[Job], concurrency: int, processes: int) -> list[Outcome]:
    """All jobs, in their order. Jobs without a time keep `concurrency` clients busy; the others begin
    when they are due. There is at least one job. Raises BenchError if a client process dies."""
    processes = min(processes, concurrency or len(jobs), len(jobs))
    next_job = _SPAWN.Value("i", 0)
    clients = []
    for number in range(processes):
        ours, theirs = _SPAWN.Pipe()
        share = concurrency // processes + (number < concurrency % processes)
        arguments = (theirs, port, list(jobs), number, processes, share, next_job)
        client = _SPAWN.Process(target=_client, args=arguments, daemon=True)
        client.start()
        theirs.close()
        clients.append((client, ours))
    outcomes: dict[int, Outcome] = {}
    try:
        for _, ours in clients:
            ours.recv()  # it is there
        start = time.monotonic() + _LEAD_SECONDS
        for _, ours in clients:
            ours.send(start)
        for _, ours in clients:
            outcomes |= ours.recv()
    except EOFError:
        raise BenchError("a client process died") from None
    finally:
        for client, ours in clients:
            ours.close()
            client.join(10)
    return [outcomes[place] for place in range(len(jobs))]


def _client(
    pipe: Connection, port: int, jobs: list[Job], number: int, processes: int, share: int, next_job: Any
) -> None:
    """The main function of a client process."""
    pipe.send("ready")
    start = pipe.recv()
    timed = [place for place, job in enumerate(jobs) if job.due is not None][number::processes]
    found = asyncio.run(_all(port, jobs, timed, share, next_job, start))
    # Parsing waits until the last stream of this process has ended.
    pipe.send({place: Outcome(asked, _answer(one)) for place, (asked, one) in found.items()})


_Found = dict[int, tuple[float, Recording | str]]


async def _all(
    port: int, jobs: list[Job], timed: list[int], share: int, next_job: Any, start: float
) -> _Found:
    found: _Found = {}

    async def one(place: int, asked: float) -> None:
        found[place] = (asked, await _stream(port, jobs[place].request))

    async def on_time(place: int) -> None:
        asked = start + (jobs[place].due or 0.0)
        await asyncio.sleep(max(0.0, asked - time.monotonic()))
        await one(place, asked)

    async def worker() -> None:
        await asyncio.sleep(max(0.0, start - time.monotonic()))
        while (place := _take(next_job, jobs)) is not None:
            await one(place, time.monotonic())

    await asyncio.gather(*map(on_time, timed), *(worker() for _ in range(share)))
    return found


def _take(next_job: Any, jobs: list[Job]) -> int | None:
    """The next job without a time, for whichever client of whichever process comes first."""
    lock: Lock = next_job.get_lock()
    with lock:
        while next_job.value < len(jobs) and jobs[next_job.value].due is not None:
            next_job.value += 1
        place: int = next_job.value
        next_job.value += 1
    return place if place < len(jobs) else None


async def _stream(port: int, request: bytes) -> Recording | str:
    """The recorded answer, or why there is none."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        recording = Recording()
        writer.write(request)
        while not recording.ended and (data := await reader.read(_READ_BYTES)):
            recording.add(data)
        writer.close()
        return recording
    except OSError as error:
        return str(error)


def _answer(found: Recording | str) -> Answer:
    return Answer(error=found) if isinstance(found, str) else read(found)
