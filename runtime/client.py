"""Starts, supervises and talks to the engine's processes. The handler and the Python API both sit on it.

The engine is a child process for each of its ranks, at the other end of a socket pair. If one of them dies,
the others are ended, whatever was in flight ends with `EngineUnavailable`, and it is started again; if it
says that starting again cannot help (`Fatal`), the client stays up in the state "failed" and says why. An
engine that dies in its sleep, or was told to leave, is started again by the next request.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from runtime.processes import EngineProcess, reap, start_engine
from runtime.protocol import (
    Abort,
    Asleep,
    Awake,
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
    Sleep,
    SleepLevel,
    StepOutput,
    Submit,
    TokenDelta,
    Wake,
    decode_event,
    encode_frame,
)
from runtime.token_stream import Confirmation, EngineUnavailable, TokenStream

__all__ = ["EngineClient", "EngineUnavailable", "State", "TokenStream"]

State = Literal["cold", "loading", "warm", "asleep", "waking", "draining", "failed"]

# A start that dies this often in a row without getting ready is not going to succeed by itself.
MAX_FAILED_STARTS = 4
_READ_BYTES = 1 << 18


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
        self.restarts = self.sleeps = self.wakes = 0
        self.sleep_level: SleepLevel | None = None
        self.wake_seconds: float | None = None
        self._ranks: list[EngineProcess] = []
        self._writer: asyncio.StreamWriter | None = None
        self._outbox: list[bytes] = []
        self._streams: dict[str, TokenStream] = {}
        self._confirmation = Confirmation()
        self._changed = asyncio.Event()
        self._directory: Path | None = None
        self._failed_starts = 0
        self._broken: str | None = None
        self._called = asyncio.Event()
        self._leaving = False
        self._naps = 0  # each time that the engine said it sleeps, deeper ones of a sleeper included

    # ---- life ----------------------------------------------------------------------------------

    def spawn(self, started: list[EngineProcess] | None = None) -> None:
        """Start the engine's processes, or take on those that `start_engine` has. Needs no event loop."""
        self._ranks = started or start_engine(self.config)
        self._set_state("loading")

    @property
    def pid(self) -> int | None:
        """The process id of the engine's rank 0 while there is an engine."""
        return self._ranks[0].pid if self._ranks else None

    @property
    def pids(self) -> list[int]:
        """The process ids of all its ranks."""
        return [process.pid for process in self._ranks]

    async def run(self, at_once: bool = True) -> None:
        """Read what the engine sends and start it again when it dies, until it fails or is closed.

        An engine that was not spawned before is started now or, if not `at_once`, when it is called.
        """
        if at_once:
            self.call()
        while self.state not in ("draining", "failed"):
            if not self._ranks:
                await self._wait_turn()
                if self.state not in ("cold", "loading"):
                    break
                self.spawn()
            first = await self._read_until_end()
            await reap(self._ranks)
            if self.state in ("draining", "failed"):
                break
            if self._leaving:
                self._leaving = False
                self._forget_engine()
            else:
                self._note_death(first)
        self._ranks = []
        self._end_streams(EngineUnavailable(self.failure or "The server is shutting down."))

    async def _wait_turn(self) -> None:
        """Until an engine is to be started: when it is called, or some time after a start that failed."""
        if self.state == "cold":
            await self._called.wait()
            self._called.clear()
        elif self._failed_starts:
            await asyncio.sleep(0.25 * 2**self._failed_starts)

    def call(self) -> None:
        """Have the engine take requests soon: wake it if it sleeps, start it if there is none."""
        if self.state == "asleep":
            self._set_state("waking")
            self._send(Wake())
        elif self.state == "cold":
            self._called.set()

    async def wake(self) -> None:
        """Like `call`, and wait until it does take requests. Raises `EngineUnavailable` if it fails."""
        if self.state == "warm":
            self._send(Wake())  # it may be falling asleep
        while self.state != "warm":
            self.call()
            await self._wait_change()

    async def sleep(self, level: SleepLevel) -> None:
        """Once nothing runs any more, have the engine give back its memory; return when it has.

        Requests that come meanwhile wait, and wake it again. One that loads does that first. Raises
        `EngineUnavailable` if the engine ends instead.
        """
        if self.state == "cold":
            return
        await self.wait_ready()
        before = self._naps
        self._send(Sleep(level))
        while self._naps == before:
            if self.info is None:
                raise EngineUnavailable(self.failure or "The engine ended while it was falling asleep.", 2.0)
            await self._wait_change()

    def doze_off(self, level: SleepLevel) -> None:
        """Have the engine sleep if nothing is in flight and nothing comes meanwhile."""
        if self.state == "warm" and not self._streams:
            self._send(Sleep(level, when_idle=True))

    def leave(self) -> None:
        """End the engine once nothing runs any more. What comes from now on starts another."""
        if self.state in ("warm", "asleep"):
            self._send(Drain())
            self._writer = None  # what is sent from here on is for the next engine
            self._leaving = True
            self._set_state("cold")

    def forgive(self) -> None:
        """Forget a failure: with `run`, which has returned, the engine may be tried again."""
        self.failure, self._failed_starts = None, 0
        self._forget_engine()
        self._set_state("cold")

    def give_up(self, why: str) -> None:
        """End the engine for good: with what its model's files hold, nothing can be answered."""
        self._fail(why)
        for process in self._ranks:
            process.kill()

    async def close(self, drain_seconds: float) -> None:
        """Let submitted requests finish for at most `drain_seconds`, then end the engine process."""
        if self.state != "failed":
            self._set_state("draining")
            self._send(Drain())
            self._called.set()
        ranks = self._ranks
        deadline = time.monotonic() + drain_seconds
        while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for process in ranks:
            if process.poll() is None:
                process.kill()
        await reap(ranks)
        if self._writer is not None:
            self._writer.close()

    # ---- requests ------------------------------------------------------------------------------

    def submit(self, *requests: Submit) -> TokenStream:
        """Queue sequences; the engine takes them up as soon as it is ready.

        Raises `EngineUnavailable` at once if the engine has failed or is shutting down.
        """
        if self.state in ("failed", "draining"):
            raise EngineUnavailable(self.failure or "The server is shutting down.", retry_after=5.0)
        stream = TokenStream(self.abort, [request.request_id for request in requests])
        self.call()
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

    async def wait_verified(self) -> None:
        """Like `wait_ready`, and until the engine's weights are verified. Raises `EngineUnavailable`."""
        await self.wait_ready()
        await self._confirmation.wait()

    async def wait_directory(self) -> Path:
        """The folder with config and tokenizer files, as soon as they are there (before the weights)."""
        while self._directory is None:
            await self._wait_change()
        return self._directory

    async def _wait_change(self) -> None:
        if self.state == "failed":
            raise EngineUnavailable(self.failure or "The engine could not start.", retry_after=30.0)
        if self.state == "cold":
            self.call()
        await self._changed.wait()

    def _fail(self, why: str) -> None:
        self.failure = why
        self._set_state("failed")

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
        expected = self.state == "draining" or self._leaving
        if len(readers) > 1 and not (expected and await asyncio.to_thread(first.wait) == 0):
            for process in self._ranks:
                if process is not first:
                    process.kill()
        # What was sent before the end is still there to be read.
        await asyncio.gather(*readers)
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
                    if self.state != "failed":  # else nothing that it says counts any more
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
                self._confirmation = Confirmation(event.unverified)
                self._set_state("warm")
            case Mark():
                self._note_mark(event)
            case Asleep():
                self._naps += 1
                self.sleeps += self.sleep_level is None
                self.sleep_level = event.level
                if self.state == "warm":
                    # What was submitted while this was on its way wakes the engine.
                    self.state = "waking" if self._streams else "asleep"
                self._notify()
            case Awake():
                self._note_awake(event.seconds)
            case Fatal():
                self._fail(event.message)
            case Broken():
                self._broken = event.message

    def _note_mark(self, mark: Mark) -> None:
        self.marks.setdefault(mark.name, mark.seconds)
        if mark.name == "verified":
            self._confirmation.confirm()
        self._notify()

    def _note_awake(self, seconds: float) -> None:
        if self.sleep_level is not None:
            self.wakes += 1
            self.wake_seconds = seconds
            self.sleep_level = None
        if self.state in ("asleep", "waking"):
            self._set_state("warm")

    def _deliver(self, delta: TokenDelta) -> None:
        stream = self._streams.get(delta.request_id)
        if stream is None:
            return  # aborted here while this was on its way
        if delta.finish_reason is not None:
            del self._streams[delta.request_id]
        stream.put(delta, self._confirmation)

    # ---- death ---------------------------------------------------------------------------------

    def _note_death(self, first: EngineProcess) -> None:
        asleep = self.state in ("asleep", "waking")
        doing = self.state if asleep else "serving" if self.info else "starting"
        whose = "The engine" if len(self._ranks) == 1 else f"Rank {first.rank} of the engine"
        ended = (self._broken or f"{whose} ended {first.ending()} while it was {doing}").removesuffix(".")
        died_asleep = self.state == "asleep"
        self._failed_starts = 0 if self.info else self._failed_starts + 1
        self._outbox.clear()
        self._end_streams(EngineUnavailable(f"{ended}; it is being restarted.", 2.0))
        self._forget_engine()
        if self._failed_starts >= MAX_FAILED_STARTS:
            self._fail(f"{ended}, {self._failed_starts} times in a row; its own messages are on stderr.")
        else:
            self.restarts += 1
            self._set_state("cold" if died_asleep else "loading")
        print(f"firstlight: {ended}", file=sys.stderr, flush=True)

    def _forget_engine(self) -> None:
        """What was said of an engine holds no longer."""
        self._confirmation.refute(EngineUnavailable("The engine ended before its weights were verified."))
        self.info = self.sleep_level = self._broken = None
        self._ranks = []
        self.stats = EngineStats()
        self._notify()

    def _end_streams(self, error: EngineUnavailable) -> None:
        self._confirmation.refute(error)
        streams, self._streams = set(self._streams.values()), {}
        for stream in streams:
            stream.fail(error)
