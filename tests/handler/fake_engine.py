"""An engine for tests of the HTTP side: it says what the test tells it to say, when it tells it to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.client import EngineUnavailable
from runtime.protocol import (
    EngineConfig,
    EngineStats,
    Progress,
    Ready,
    Submit,
    TokenDelta,
    TokenLogprobs,
)
from runtime.text.tokenizer import Tokenizer

EOS = 258
READY = Ready(
    device="fake",
    dtype="float32",
    max_model_len=512,
    vocab_size=264,
    block_size=16,
    num_blocks=100,
    weight_bytes=1234,
    marks={"ready": 0.5},
    counters={"bytes_read": 1234},
)


class FakeStream:
    """What `EngineClient.submit` returns, fed by the fake."""

    def __init__(self, engine: FakeEngine, request_ids: list[str]) -> None:
        self.engine = engine
        self.running = set(request_ids)
        self.queue: asyncio.Queue[TokenDelta | Exception] = asyncio.Queue()

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> list[TokenDelta]:
        if not self.running and self.queue.empty():
            raise StopAsyncIteration
        items = [await self.queue.get()]
        while not self.queue.empty():
            items.append(self.queue.get_nowait())
        for item in items:
            if isinstance(item, Exception):
                self.running.clear()
                raise item
        return items  # type: ignore[return-value]  # they are all deltas

    def put(self, delta: TokenDelta) -> None:
        if delta.finish_reason is not None:
            self.running.discard(delta.request_id)
        self.queue.put_nowait(delta)

    def abort(self, request_id: str) -> None:
        if request_id in self.running:
            self.running.discard(request_id)
            self.engine.abort([request_id])

    async def confirmed(self) -> None:
        pass

    def close(self) -> None:
        self.engine.abort(sorted(self.running))
        self.running.clear()


class FakeEngine:
    """`reply` maps a request to the text that is said, or to the deltas themselves."""

    def __init__(
        self, directory: Path, reply: Callable[[Submit], str | list[TokenDelta]], config: EngineConfig
    ):
        self.config = config
        self.directory = directory
        self.tokenizer = Tokenizer.load(directory)
        self.reply = reply
        self.state = "warm"
        self.progress = Progress(phase="load")
        self.info: Ready | None = READY
        self.stats = EngineStats()
        self.marks: dict[str, float] = {"listen": 0.1, "ready": 0.5}
        self.failure: str | None = None
        self.restarts = 0
        self.sleeps = 0
        self.wakes = 0
        self.sleep_level: int | None = None
        self.wake_seconds: float | None = None
        self.endless = False  # say the reply, then go on without ever ending
        self.submitted: list[Submit] = []
        self.aborted: list[str] = []
        self.abort_seen = threading.Event()
        self.submit_seen = threading.Event()
        self.closed = threading.Event()
        self.streams: dict[str, FakeStream] = {}
        self.loop: asyncio.AbstractEventLoop | None = None
        self.changed = asyncio.Event()

    # ---- for tests, from any thread -------------------------------------------------------------

    def set_loading(self, done: int = 43, total: int = 100) -> None:
        """Go back to the time before the model was there. Call before the server starts."""
        self.state, self.info = "loading", None
        self.marks.pop("ready")
        self.progress = Progress(phase="load", bytes_done=done, bytes_total=total)

    def become_ready(self) -> None:
        def change() -> None:
            self.state, self.info = "warm", READY
            self.marks["ready"] = 0.5
            self.changed.set()
            for submit in self.submitted:
                if submit.request_id in self.streams:
                    self.play(submit)

        assert self.loop is not None
        self.loop.call_soon_threadsafe(change)

    def die(self) -> None:
        """What a crash does to everything in flight."""

        def end() -> None:
            for stream in set(self.streams.values()):
                stream.queue.put_nowait(EngineUnavailable("The engine ended; it is being restarted.", 2.0))

        assert self.loop is not None
        self.loop.call_soon_threadsafe(end)

    # ---- EngineClient ---------------------------------------------------------------------------

    def spawn(self) -> None:
        self.state = "loading"

    async def run(self, at_once: bool = True) -> None:
        self.loop = asyncio.get_running_loop()
        await asyncio.Event().wait()

    async def wait_ready(self) -> Ready:
        while self.info is None:
            await self.changed.wait()
        return self.info

    async def wait_verified(self) -> None:
        await self.wait_ready()

    async def wait_directory(self) -> Path:
        return self.directory

    async def sleep(self, level: int) -> None:
        self.state, self.sleep_level = "asleep", level
        self.sleeps += 1

    def doze_off(self, level: int) -> None:
        if self.state == "warm" and not self.streams:
            self.state, self.sleep_level = "asleep", level
            self.sleeps += 1

    async def wake(self) -> None:
        if self.state == "asleep":
            self.state, self.sleep_level, self.wake_seconds = "warm", None, 0.25
            self.wakes += 1

    async def close(self, drain_seconds: float) -> None:
        self.closed.set()
        raise_in = asyncio.all_tasks()
        for task in raise_in:
            if task.get_coro().__qualname__ == "FakeEngine.run":  # type: ignore[union-attr]
                task.cancel()

    def submit(self, *requests: Submit) -> FakeStream:
        if self.state in ("failed", "draining"):
            raise EngineUnavailable(self.failure or "The server is shutting down.", 5.0)
        if self.state == "asleep":
            self.state, self.sleep_level = "warm", None
            self.wakes += 1
        stream = FakeStream(self, [request.request_id for request in requests])
        for request in requests:
            self.streams[request.request_id] = stream
            self.submitted.append(request)
            if self.state == "warm":
                self.play(request)
        self.submit_seen.set()
        return stream

    def abort(self, request_ids: Any) -> None:
        for request_id in request_ids:
            if self.streams.pop(request_id, None):
                self.aborted.append(request_id)
                self.abort_seen.set()

    @property
    def in_flight(self) -> int:
        return len(self.streams)

    # ---- speaking -------------------------------------------------------------------------------

    def play(self, request: Submit) -> None:
        reply = self.reply(request)
        deltas = self.spell(request, reply) if isinstance(reply, str) else reply
        if self.endless:
            deltas = [delta for delta in deltas if delta.finish_reason is None]
        self.speaking = asyncio.ensure_future(self.speak(request.request_id, deltas))

    async def speak(self, request_id: str, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            stream = self.streams.get(request_id)
            if stream is None:
                return
            if delta.finish_reason is not None:
                del self.streams[request_id]
            stream.put(delta)
            await asyncio.sleep(0)

    def spell(self, request: Submit, text: str) -> list[TokenDelta]:
        """One delta for each token, in the way of an engine: limits and stop ids are honoured."""
        sampling = request.sampling
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        finish, stop_id = ("length", None) if len(ids) >= sampling.max_tokens else ("stop", EOS)
        deltas = [
            TokenDelta(
                request_id=request.request_id, token_ids=[token], logprobs=scores([token], sampling.logprobs)
            )
            for token in ids[: sampling.max_tokens]
        ]
        first = deltas[0] if deltas else TokenDelta(request_id=request.request_id)
        if sampling.prompt_logprobs is not None:
            prompt = request.prompt_token_ids
            first.prompt_logprobs = [None, *scores(prompt[1:], sampling.prompt_logprobs)]
        first.num_cached_tokens = 16
        if stop_id is not None and stop_id in sampling.stop_token_ids:
            end = TokenDelta(request_id=request.request_id, finish_reason="stop", stop_token_id=stop_id)
            return [*(deltas or [first]), end]
        deltas[-1].finish_reason = finish
        return deltas


def scores(ids: list[int], top: int | None) -> list[TokenLogprobs]:
    """Made-up log-probabilities: the token itself is the likeliest, the ids after it follow."""
    if top is None:
        return []
    return [
        TokenLogprobs(token, -0.5, 1, [((token + place) % 256, -0.5 - place) for place in range(top)])
        for token in ids
    ]
