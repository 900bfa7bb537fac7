"""This project's engine without HTTP and without text: token ids in, token ids out."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import uuid
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from harness import ROOT, BenchError
from harness.workload import Request

if TYPE_CHECKING:
    from runtime.client import EngineClient
    from runtime.protocol import EngineConfig

T = TypeVar("T")

_GRAPHS_SECONDS = 30.0


class OfflineEngine:
    """An engine process, worked by an event loop in a thread. To be used in a `with` block."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Start the engine and wait until it is ready. `settings` are fields of `EngineConfig`."""
        if str(ROOT) not in sys.path:
            sys.path.append(str(ROOT))
        from runtime.client import EngineClient

        self._client: EngineClient = EngineClient(engine_config(folder, settings))
        self._client.spawn()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._running = self._call(self._start())
        try:
            self._call(self._client.wait_ready())
        except BenchError:
            self.close()
            raise

    async def _start(self) -> asyncio.Task[None]:
        return asyncio.create_task(self._client.run())

    async def _end(self) -> None:
        await self._client.close(drain_seconds=0)
        await asyncio.gather(self._running, return_exceptions=True)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Let the event loop do `work`, and wait for it."""
        from runtime.client import EngineUnavailable

        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except EngineUnavailable as error:
            raise BenchError(f"firstlight: {error}") from None

    def generate(self, requests: Sequence[Request], concurrency: int | None = None) -> list[list[int]]:
        """Greedy token ids, exactly as many as each request asks for, whatever they are.

        All requests are submitted at once, or at most `concurrency` of them at a time.
        """
        return self._call(self._generate(requests, concurrency or max(len(requests), 1)))

    def wait_for_graphs(self) -> bool:
        """Leave the engine in peace until it has captured its CUDA graphs; False if it never says so."""
        deadline = time.monotonic() + _GRAPHS_SECONDS
        while "graphs" not in self._client.marks and time.monotonic() < deadline:
            time.sleep(0.05)
        return "graphs" in self._client.marks

    async def _generate(self, requests: Sequence[Request], concurrency: int) -> list[list[int]]:
        slots = asyncio.Semaphore(concurrency)
        return await asyncio.gather(*(self._answer(request, slots) for request in requests))

    async def _answer(self, request: Request, slots: asyncio.Semaphore) -> list[int]:
        from runtime.protocol import SamplingParams, Submit

        sampling = SamplingParams(max_tokens=request.max_tokens, temperature=0.0)
        submit = Submit(request_id=uuid.uuid4().hex, prompt_token_ids=request.prompt, sampling=sampling)
        token_ids: list[int] = []
        async with slots:
            async for deltas in self._client.submit(submit):
                for delta in deltas:
                    if delta.error is not None:
                        raise BenchError(f"firstlight: {delta.error}")
                    token_ids += delta.token_ids
        return token_ids

    def close(self) -> None:
        """End the engine process."""
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def __enter__(self) -> OfflineEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def engine_config(folder: Path, settings: dict[str, Any]) -> EngineConfig:
    """The configuration of an engine for this model; `settings` are fields of it."""
    from runtime.catalogue import find_catalogue, load_catalogue
    from runtime.protocol import EngineConfig
    from runtime.weights.sources.cache import default_cache_dir

    spec = load_catalogue(find_catalogue()).resolve(str(folder))
    try:
        return EngineConfig.of(spec, str(default_cache_dir()), **settings)
    except TypeError as error:
        raise BenchError(str(error)) from None
