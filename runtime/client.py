"""Starts, supervises and talks to the engine process. The handler and the Python API both sit on it.

The engine is a child process at the other end of a socket pair. If it dies, whatever was in flight
ends with `EngineUnavailable`, and it is started again; if it says that starting again cannot help
(`Fatal`), the client stays up in the state "failed" and says why.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Literal

from runtime.errors import FirstlightError
from runtime.processes import EngineProcess, start_engine
from runtime.protocol import (
    Abort,
    Broken,
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


class EngineUnavailable(FirstlightError):
    """The engine died, cannot start or is shutting down. `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TokenStream(AsyncIterator[TokenDelta]):
    """The deltas of one submitted request, in order; closing it early aborts the request."""

    def __init__(self, client: EngineClient, request_id: str) -> None:
        self._client = client
        self._request_id = request_id
        self._queue: asyncio.Queue[TokenDelta | EngineUnavailable] = asyncio.Queue()
        self._finished = False

    async def __anext__(self) -> TokenDelta:
        if self._finished:
            raise StopAsyncIteration
        try:
            item = await self._queue.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if isinstance(item, EngineUnavailable):
            self._finished = True
            raise item
        self._finished = item.finish_reason is not None
        return item

    async def aclose(self) -> None:
        """Stop listening. The engine is told to forget the request unless it has ended already."""
        if not self._finished:
            self._finished = True
            self._client.abort([self._request_id])

    def take_waiting(self) -> list[TokenDelta]:
        """The deltas that have arrived already, without waiting; empty when there are none."""
        waiting: list[TokenDelta] = []
        while not self._finished and not self._queue.empty():
            item = self._queue.get_nowait()
            if isinstance(item, EngineUnavailable):
                self._queue.put_nowait(item)  # the next __anext__ raises it
                break
            self._finished = item.finish_reason is not None
            waiting.append(item)
        return waiting

    def put(self, item: TokenDelta | EngineUnavailable) -> None:
        """Hand over what the engine sent; called by the client alone."""
        self._queue.put_nowait(item)


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
        self._ranks: list[EngineProcess] = []
        # What one of them said of its end, before it came.
        self._why: str | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._outbox: list[bytes] = []
        self._streams: dict[str, TokenStream] = {}
        self._changed = asyncio.Event()
        self._directory: Path | None = None
        self._failed_starts = 0

    # ---- life ----------------------------------------------------------------------------------

    def spawn(self) -> None:
        """Start the engine's processes. Needs no event loop, so it can come before heavy imports."""
        self._why = None
        self._ranks = start_engine(self.config)
        self._set_state("loading")

    @property
    def pid(self) -> int | None:
        """The process id of rank 0 while there is an engine."""
        return self._ranks[0].pid if self._ranks else None

    @property
    def pids(self) -> list[int]:
        """The process ids of the engine's ranks while there is such an engine."""
        return [process.pid for process in self._ranks]

    async def run(self) -> None:
        """Read what the engine sends and start it again when it dies, until it fails or is closed."""
        if not self._ranks:
            self.spawn()
        while True:
            first = await self._read_until_end()
            await self._reap()
            if self.state in ("draining", "failed"):
                self._end_streams(EngineUnavailable(self.failure or "The server is shutting down."))
                return
            self._failed_starts = 0 if self.info else self._failed_starts + 1
            self._note_death(first)
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
        deadline = time.monotonic() + drain_seconds
        while any(process.poll() is None for process in self._ranks) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for process in self._ranks:
            if process.poll() is None:
                process.kill()
        for process in self._ranks:
            await asyncio.to_thread(process.wait)
        if self._writer is not None:
            self._writer.close()

    # ---- requests ------------------------------------------------------------------------------

    def submit(self, request: Submit) -> TokenStream:
        """Queue one sequence; the engine takes it up as soon as it is ready.

        Raises `EngineUnavailable` at once if the engine has failed or is shutting down.
        """
        if self.state in ("failed", "draining"):
            raise EngineUnavailable(self.failure or "The server is shutting down.", retry_after=5.0)
        stream = TokenStream(self, request.request_id)
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

    async def _read_until_end(self) -> EngineProcess:
        """Listen to all ranks until one of them is gone, and end the others; the one that went first."""
        readers = {asyncio.create_task(self._read(process)): process for process in self._ranks}
        done, _ = await asyncio.wait(readers, return_when=asyncio.FIRST_COMPLETED)
        first = min((readers[task] for task in done), key=lambda process: process.rank)
        status = await asyncio.to_thread(first.wait) if self.state == "draining" else None
        if status != 0:
            for process in self._ranks:
                if process is not first:
                    process.kill()
        # What was sent before the end is still there to be read.
        await asyncio.gather(*readers)
        self._writer = None
        return first

    async def _read(self, process: EngineProcess) -> None:
        """Take what a rank sends until it hangs up. Commands go to rank 0, which passes them on."""
        reader, writer = await asyncio.open_connection(sock=process.socket)
        if process.rank == 0:
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
        if process.rank == 0:
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
            case Broken():
                self._why = self._why or event.message
            case Fatal():
                if self.failure is None:
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

    async def _reap(self) -> None:
        for process in self._ranks:
            try:
                await asyncio.wait_for(asyncio.to_thread(process.wait), 10)
            except TimeoutError:
                process.kill()  # it closed its socket but did not end
                await asyncio.to_thread(process.wait)

    def _note_death(self, first: EngineProcess) -> None:
        when = "while it was serving" if self.info else "while it was starting"
        whose = "The engine" if len(self._ranks) == 1 else f"Rank {first.rank} of the engine"
        what = f"{whose} ended {first.ending()} {when}"
        if self._why is not None:
            what = f"{self._why.rstrip('.')}. {what}"
        self.info = None
        self.stats = EngineStats()
        if self._failed_starts >= MAX_FAILED_STARTS:
            self.failure = f"{what}, {self._failed_starts} times in a row; its own messages are on stderr."
            self._set_state("failed")
        else:
            self._set_state("loading")
        self._outbox.clear()
        print(f"firstlight: {what}", file=sys.stderr, flush=True)
        self._end_streams(EngineUnavailable(f"{what}; it is being restarted.", 2.0))

    def _end_streams(self, error: EngineUnavailable) -> None:
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            stream.put(error)
