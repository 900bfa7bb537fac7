"""Starts, supervises and talks to the engine process. The handler and the Python API both sit on it.

The engine is a child process at the other end of a socket pair. If it dies, whatever was in flight
ends with `EngineUnavailable`, and it is started again; if it says that starting again cannot help
(`Fatal`), the client stays up in the state "failed" and says why.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Literal

import msgspec

from runtime import marks
from runtime.errors import FirstlightError
from runtime.protocol import (
    Abort,
    Command,
    Drain,
    EngineConfig,
    EngineStats,
    Event,
    Fatal,
    FrameReader,
    Mark,
    Progress,
    Ready,
    StepOutput,
    Submit,
    TokenDelta,
    decode_event,
    encode_frame,
)

State = Literal["cold", "loading", "warm", "draining", "failed"]

# A start that dies this often in a row without getting ready is not going to succeed by itself.
MAX_FAILED_STARTS = 4
_READ_BYTES = 1 << 18
_package_root = str(Path(__file__).resolve().parent.parent)


class EngineUnavailable(FirstlightError):
    """The engine died, cannot start or is shutting down. `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TokenStream(AsyncIterator[list[TokenDelta]]):
    """What the engine makes of sequences that were submitted together, as it comes.

    Each item holds all that has arrived by then, in order and at least one delta. The iteration ends when
    every sequence has, and raises `EngineUnavailable` if the engine is gone before.
    """

    def __init__(self, client: EngineClient, request_ids: Iterable[str]) -> None:
        self._client = client
        self._running = set(request_ids)
        self._arrived: list[TokenDelta] = []
        self._failure: EngineUnavailable | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def __anext__(self) -> list[TokenDelta]:
        while not self._arrived:
            if self._failure is not None:
                raise self._failure
            if not self._running:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                self.close()
                raise
        arrived, self._arrived = self._arrived, []
        return arrived

    def abort(self, request_id: str) -> None:
        """Wait no longer for one of the sequences. The engine is told to forget it unless it has ended."""
        if request_id in self._running:
            self._running.discard(request_id)
            self._client.abort([request_id])

    def close(self) -> None:
        """Wait for nothing any more, and abort what has not ended."""
        running, self._running = self._running, set()
        if running:
            self._client.abort(running)

    def put(self, delta: TokenDelta) -> None:
        """Hand over what the engine sent; called by the client alone."""
        if delta.finish_reason is not None:
            self._running.discard(delta.request_id)
        self._arrived.append(delta)
        self._wake()

    def fail(self, error: EngineUnavailable) -> None:
        """Nothing more will come; called by the client alone."""
        self._running.clear()
        self._failure = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineClient:
    """One engine, as the process that owns it sees it. All methods but `spawn` belong to one event loop."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.state: State = "cold"
        self.progress = Progress(phase="load")
        self.info: Ready | None = None
        self.stats = EngineStats()
        self.marks: dict[str, float] = {}
        self.failure: str | None = None
        self.restarts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._outbox: list[bytes] = []
        self._streams: dict[str, TokenStream] = {}
        self._changed = asyncio.Event()
        self._directory: Path | None = None
        self._failed_starts = 0

    # ---- life ----------------------------------------------------------------------------------

    def spawn(self) -> None:
        """Start the engine process. Needs no event loop, so it can come before heavy imports."""
        ours, theirs = socket.socketpair()
        path = [_package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, **marks.environment(), "PYTHONPATH": os.pathsep.join(path)}
        arguments = ["--fd", str(theirs.fileno()), msgspec.json.encode(self.config).decode()]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "runtime.engine", *arguments],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        self._socket = ours
        self._set_state("loading")

    @property
    def pid(self) -> int | None:
        """The engine's process id while there is such a process."""
        return self._process.pid if self._process else None

    async def run(self) -> None:
        """Read what the engine sends and start it again when it dies, until it fails or is closed."""
        if self._process is None:
            self.spawn()
        while True:
            await self._read_until_end()
            status = await self._reap()
            if self.state in ("draining", "failed"):
                self._end_streams(EngineUnavailable(self.failure or "The server is shutting down."))
                return
            self._failed_starts = 0 if self.info else self._failed_starts + 1
            self._note_death(status)
            if self.state == "failed":
                return
            await asyncio.sleep(0 if self._failed_starts == 0 else 0.25 * 2**self._failed_starts)
            self.restarts += 1
            self.spawn()

    async def close(self, drain_seconds: float) -> None:
        """Let submitted requests finish for at most `drain_seconds`, then end the engine process."""
        if self.state != "failed":
            self._set_state("draining")
            self._send(Drain())
        process = self._process
        if process is None:
            return
        deadline = time.monotonic() + drain_seconds
        while process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if process.poll() is None:
            process.kill()
        await asyncio.to_thread(process.wait)
        if self._writer is not None:
            self._writer.close()

    # ---- requests ------------------------------------------------------------------------------

    def submit(self, *requests: Submit) -> TokenStream:
        """Queue sequences; the engine takes them up as soon as it is ready.

        Raises `EngineUnavailable` at once if the engine has failed or is shutting down.
        """
        if self.state in ("failed", "draining"):
            raise EngineUnavailable(self.failure or "The server is shutting down.", retry_after=5.0)
        stream = TokenStream(self, [request.request_id for request in requests])
        for request in requests:
            self._streams[request.request_id] = stream
            self._send(request)
        return stream

    def abort(self, request_ids: Iterable[str]) -> None:
        """Make the engine forget these requests; ids that have ended already are ignored."""
        known = [request_id for request_id in request_ids if self._streams.pop(request_id, None)]
        if known:
            self._send(Abort(known))

    @property
    def in_flight(self) -> int:
        """How many submitted sequences have not ended."""
        return len(self._streams)

    # ---- waiting -------------------------------------------------------------------------------

    async def wait_ready(self) -> Ready:
        """The engine's description, once it takes requests. Raises `EngineUnavailable` if it fails."""
        while self.info is None:
            await self._wait_change()
        return self.info

    async def wait_directory(self) -> Path:
        """The folder with config and tokenizer files, as soon as they are there (before the weights)."""
        while self._directory is None:
            await self._wait_change()
        return self._directory

    async def _wait_change(self) -> None:
        if self.state == "failed":
            raise EngineUnavailable(self.failure or "The engine could not start.", retry_after=30.0)
        await self._changed.wait()

    def _set_state(self, state: State) -> None:
        self.state = state
        self._notify()

    def _notify(self) -> None:
        # Whoever waits on the old event looks at the state anew; later waiters get the new event.
        self._changed.set()
        self._changed = asyncio.Event()

    # ---- the socket ----------------------------------------------------------------------------

    def _send(self, command: Command) -> None:
        frame = encode_frame(command)
        if self._writer is None:
            self._outbox.append(frame)
        else:
            self._writer.write(frame)

    async def _read_until_end(self) -> None:
        assert self._socket is not None
        reader, writer = await asyncio.open_connection(sock=self._socket)
        self._writer = writer
        writer.writelines(self._outbox)
        self._outbox.clear()
        frames = FrameReader()
        try:
            while data := await reader.read(_READ_BYTES):
                for body in frames.feed(data):
                    self._take(decode_event(body))
        except OSError:
            pass  # a killed peer may reset the socket instead of closing it: the same end
        self._writer = None
        writer.close()

    def _take(self, event: Event) -> None:
        match event:
            case StepOutput():
                self.stats = event.stats
                for delta in event.deltas:
                    self._deliver(delta)
            case Progress():
                self.progress = event
                if event.directory is not None:
                    self._directory = Path(event.directory)
                self._notify()
            case Ready():
                self.info = event
                self.marks.update(event.marks)
                self._set_state("warm")
            case Mark():
                self.marks.setdefault(event.name, event.seconds)
                self._notify()
            case Fatal():
                self.failure = event.message
                self._set_state("failed")

    def _deliver(self, delta: TokenDelta) -> None:
        stream = self._streams.get(delta.request_id)
        if stream is None:
            return  # aborted here while this was on its way
        if delta.finish_reason is not None:
            del self._streams[delta.request_id]
        stream.put(delta)

    # ---- death ---------------------------------------------------------------------------------

    async def _reap(self) -> int:
        assert self._process is not None
        try:
            return await asyncio.wait_for(asyncio.to_thread(self._process.wait), 10)
        except TimeoutError:
            self._process.kill()  # it closed its socket but did not end
            return await asyncio.to_thread(self._process.wait)

    def _note_death(self, status: int) -> None:
        how = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        when = "while it was serving" if self.info else "while it was starting"
        self.info = None
        self.stats = EngineStats()
        if self._failed_starts >= MAX_FAILED_STARTS:
            self.failure = (
                f"The engine ended {how} {when}, {self._failed_starts} times in a row; "
                "its own messages are on stderr."
            )
            self._set_state("failed")
        else:
            self._set_state("loading")
        self._outbox.clear()
        print(f"firstlight: the engine process ended {how} {when}", file=sys.stderr, flush=True)
        self._end_streams(EngineUnavailable(f"The engine ended {how} {when}; it is being restarted.", 2.0))

    def _end_streams(self, error: EngineUnavailable) -> None:
        streams, self._streams = set(self._streams.values()), {}
        for stream in streams:
            stream.fail(error)
