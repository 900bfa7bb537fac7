"""Runs the application on a socket that is listening already, until a signal or a failed engine ends it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import socket
import sys
from collections.abc import Sequence
from types import FrameType

import uvicorn

from handler import lifecycle
from handler.app import create_app
from handler.connection import Connection
from handler.limits import MAX_HEADER_BYTES
from handler.settings import ServerSettings
from handler.terminal import ProgressLine
from runtime.client import EngineClient, EngineUnavailable

# New objects that start a round of the garbage collector: more than a step of 256 streams makes.
_COLLECT_AFTER = 20_000


# As many connections as are ever wanted at once; each is an open file, and often 1,024 are allowed at first.
_OPEN_FILES = 65_536
# Longer than load balancers keep an idle connection (mostly 60 s): else they use one that was just closed.
_KEEP_ALIVE_SECONDS = 75


def serve(
    client: EngineClient,
    settings: ServerSettings,
    sock: socket.socket,
    others: Sequence[ServerSettings] = (),
) -> int:
    """Serve until a signal or the engine's final failure; return the exit status.

    `others` are further models, which are loaded when they are first asked for.
    """
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if most == resource.RLIM_INFINITY else min(most, _OPEN_FILES)
    if wanted > allowed != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))

    def end() -> None:
        print("firstlight: nobody has come for a while; this is the end", file=sys.stderr, flush=True)
        server.should_exit = True

    config = uvicorn.Config(
        create_app(client, settings, end, others),
        http=Connection,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=2 * MAX_HEADER_BYTES,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(settings.drain_seconds) + 1,
    )
    server = _Server(config)
    return asyncio.run(_run(server, client, sock))


class _Server(uvicorn.Server):
    """Ends with status 0 when a signal asks for it: the first drains, the second does not wait."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            for task in self.server_state.tasks:
                task.cancel()
        elif self.server_state.tasks:
            print("firstlight: finishing what is running; a second signal ends it now", file=sys.stderr)
        self.should_exit = True


async def _run(server: _Server, client: EngineClient, sock: socket.socket) -> int:
    beside = [
        asyncio.create_task(_stop_on_failure(server, client)),
        asyncio.create_task(_spare_what_stays(client)),
        asyncio.create_task(ProgressLine(client).show()),
    ]
    try:
        await server.serve(sockets=[sock])
    finally:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
    return 1 if client.state == "failed" else 0


async def _spare_what_stays(client: EngineClient) -> None:
    """Once all is loaded, take what stays out of the garbage collector's rounds.

    A step of many streams makes objects by the thousand, none of them in circles. Each would have the
    collector walk through every module and schema again, in the middle of the stream.
    """
    with contextlib.suppress(EngineUnavailable):
        await client.wait_ready()
        gc.freeze()
        gc.set_threshold(_COLLECT_AFTER)


async def _stop_on_failure(server: _Server, client: EngineClient) -> None:
    why = await lifecycle.wait_failure(client)
    print(f"firstlight: {why}", file=sys.stderr, flush=True)
    server.should_exit = True
