"""The processes of one engine, one for each rank: started together, and ended together.

Where a launcher starts an engine's ranks on several hosts, its environment says which of them are this
host's and where all meet: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them, or LWS_* as
Kubernetes' LeaderWorkerSet does. FIRSTLIGHT_RANKS_TOKEN must then be the same secret everywhere.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from runtime.errors import FirstlightError
from runtime.protocol import EngineConfig, encode_config
from runtime.spawn import Spawned, spawn

TOKEN = "FIRSTLIGHT_RANKS_TOKEN"
_DEFAULT_PORT = "29500"


class LaunchError(FirstlightError):
    """The launcher's environment does not fit the engine."""


@dataclass(frozen=True)
class Place:
    """Which ranks this host has: `count` from `first` on. `meeting` is what they must know to find all."""

    first: int
    count: int
    meeting: dict[str, str]


def place_of(world_size: int, environment: Mapping[str, str]) -> Place:
    """What the launcher says; with none, all ranks are here. Raises `LaunchError`."""
    if "LWS_GROUP_SIZE" in environment:
        hosts, host = int(environment["LWS_GROUP_SIZE"]), int(environment.get("LWS_WORKER_INDEX", "0"))
        address = environment.get("LWS_LEADER_ADDRESS", "")
        asked = "LWS_GROUP_SIZE"
    elif "RANK" in environment and "WORLD_SIZE" in environment:
        hosts, host = int(environment["WORLD_SIZE"]), int(environment["RANK"])
        address = environment.get("MASTER_ADDR", "")
        asked = "WORLD_SIZE"
    else:
        return Place(0, world_size, {})
    if world_size == 1 or hosts == 1:
        return Place(0, world_size, {})
    if world_size % hosts:
        raise LaunchError(
            f"--tensor-parallel-size {world_size} does not divide by {asked}={hosts}: each host needs as "
            "many ranks as the others."
        )
    if not address or not environment.get(TOKEN):
        raise LaunchError(
            f"{asked}={hosts} spreads the ranks: set MASTER_ADDR (or LWS_LEADER_ADDRESS) to rank 0's host, "
            f"and {TOKEN} to the same secret everywhere."
        )
    meeting = {
        "MASTER_ADDR": address,
        "MASTER_PORT": environment.get("MASTER_PORT", _DEFAULT_PORT),
        TOKEN: environment[TOKEN],
    }
    count = world_size // hosts
    return Place(host * count, count, meeting)


class EngineProcess:
    """One rank's process, and this end of its socket, which is told what it is to serve."""

    def __init__(self, config: EngineConfig, spawned: Spawned) -> None:
        self.rank = config.rank
        self._process, self.socket = spawned
        self.pid = self._process.pid
        with contextlib.suppress(BrokenPipeError):  # who reads the socket learns that it has ended
            self.socket.sendall(encode_config(config))

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def wait(self) -> int:
        """Its exit status, once it has ended."""
        return self._process.wait()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def ending(self) -> str:
        """How it ended, once it has: "by signal SIGKILL", "with status 1"."""
        status = self.wait()
        return f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"


def start_engine(config: EngineConfig, spawned: Spawned | None = None) -> list[EngineProcess]:
    """Start all of the engine's ranks that belong on this host; a single one may have been spawned before.

    Raises `LaunchError`.
    """
    place = place_of(config.world_size, os.environ)
    if config.world_size == 1:
        return [EngineProcess(config, spawned or spawn(config.device))]
    import secrets  # and hashlib: only here

    if spawned is not None:
        spawned.socket.close()  # a rank has more in its environment
    listener = None
    meeting = place.meeting
    if not meeting:
        # A port that nobody else can have taken by the time that rank 0 listens on it.
        listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        address, port = listener.getsockname()
        meeting = {"MASTER_ADDR": address, "MASTER_PORT": str(port), TOKEN: secrets.token_hex(16)}
    processes = []
    for number in range(place.count):
        rank = place.first + number
        further = {**meeting, **_devices(number, place.count)}
        own = msgspec.structs.replace(config, rank=rank)
        processes.append(EngineProcess(own, spawn(config.device, further, listener if rank == 0 else None)))
    if listener is not None:
        listener.close()
    return processes


async def reap(processes: list[EngineProcess]) -> None:
    """Wait until these have ended. One that closed its socket, but does not end, is made to."""
    import asyncio  # not needed to start them, which is what a start does first

    for process in processes:
        try:
            await asyncio.wait_for(asyncio.to_thread(process.wait), 10)
        except TimeoutError:
            process.kill()
            await asyncio.to_thread(process.wait)


def _devices(number: int, count: int) -> dict[str, str]:
    """The GPUs that a host's rank of this number sees: its own first, then those it shares memory with."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(n) for n in range(count)] if visible is None else [d for d in visible.split(",") if d]
    own = devices[number : number + 1]
    return {"CUDA_VISIBLE_DEVICES": ",".join([*own, *(d for d in devices[:count] if own and d not in own)])}
