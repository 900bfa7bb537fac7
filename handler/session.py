"""Generation inside this process, without HTTP: what `firstlight chat` and `firstlight generate` talk to."""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import time
from collections.abc import Generator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from handler.settings import ServerSettings
from handler.terminal import ProgressLine
from runtime.client import EngineClient


@dataclass(frozen=True)
class Spent:
    """What an answer took. The time runs from its first token to its last."""

    prompt_tokens: int
    completion_tokens: int
    seconds: float

    def __str__(self) -> str:
        line = f"{self.prompt_tokens} tokens read, {self.completion_tokens} written"
        if self.completion_tokens > 1 and self.seconds > 0:
            line += f", {(self.completion_tokens - 1) / self.seconds:.0f} a second"
        return line


class Session:
    """An engine of one's own, worked by an event loop in a thread, so that Ctrl-C is left to the caller."""

    def __init__(self, settings: ServerSettings) -> None:
        """Start the engine. It loads while the caller goes on."""
        self._client = EngineClient(settings.engine)
        self._client.spawn()

        from handler.service import Service  # only after the engine is on its way

        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="firstlight", daemon=True)
        self._thread.start()
        self._service = asyncio.run_coroutine_threadsafe(self._begin(Service, settings), self._loop).result()
        self.spent: Spent | None = None

    async def _begin(self, service: Any, settings: ServerSettings) -> Any:
        self._engine = asyncio.create_task(self._client.run())
        return service(self._client, settings)

    def stream(self, body: dict[str, Any]) -> Generator[str, None, None]:
        """The answer to an OpenAI body (with `messages` or `prompt`), piece by piece.

        Leaving the iteration early aborts the answer. Raises `FirstlightError` where HTTP has an error.
        """
        pieces: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()
        task = asyncio.run_coroutine_threadsafe(self._generate(body, pieces), self._loop)
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            task.cancel()

    async def _generate(
        self, body: dict[str, Any], pieces: queue.SimpleQueue[str | Exception | None]
    ) -> None:
        from handler.openai.chat import ChatCompletions
        from handler.openai.completions import Completions
        from runtime.text.generation import run

        progress = asyncio.create_task(self._show_progress())
        self.spent = None
        try:
            kind = ChatCompletions if "messages" in body else Completions
            answer = kind(self._service).parse(body)
            sequences = await answer.prepare()
            first = None
            async with aclosing(run(self._client, sequences)) as batches:
                async for batch in batches:
                    progress.cancel()
                    first = first or time.perf_counter()
                    for delta in batch:
                        pieces.put(delta.text)
            usage = answer.usage()
            elapsed = time.perf_counter() - (first or time.perf_counter())
            self.spent = Spent(usage["prompt_tokens"], usage["completion_tokens"], elapsed)
            pieces.put(None)
        except Exception as error:
            pieces.put(error)
        finally:
            progress.cancel()

    async def _show_progress(self) -> None:
        if sys.stderr.isatty():
            await ProgressLine(self._client).show()

    def has_template(self) -> bool:
        """Whether the model takes conversations. Waits for its small files."""
        text = asyncio.run_coroutine_threadsafe(self._service.text.ready(), self._loop).result()
        return text.template is not None

    def close(self) -> None:
        """End the engine and the thread."""
        closing = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        closing.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _end(self) -> None:
        await self._client.close(drain_seconds=0)
        await asyncio.gather(self._engine, return_exceptions=True)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def sampling_fields(given: dict[str, Any]) -> dict[str, Any]:
    """The request fields among a command's flags."""
    names = ("temperature", "top_p", "max_tokens", "seed")
    return {name: given[name] for name in names if name in given}
