"""The served model's text side, loaded once, as soon as the model's small files are there.

That is long before its weights are, so prompts are tokenized, and requests are on their way to the
engine, while the engine is still loading.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from runtime.client import EngineClient, EngineUnavailable
from runtime.errors import FirstlightError

if TYPE_CHECKING:
    from pathlib import Path

    from handler.settings import ServerSettings
    from runtime.text.model_text import ModelText, TextFiles

# Up to here, work on text is quicker than handing it to a thread.
_INLINE_CHARACTERS = 2000
T = TypeVar("T")


class TextRoom:
    """Loads the model's text side once, as soon as its files are there, and keeps it."""

    def __init__(self, client: EngineClient, settings: ServerSettings) -> None:
        self._client = client
        self._settings = settings
        self._loading: asyncio.Task[ModelText] | None = None

    async def ready(self) -> ModelText:
        """The text side; waits for the files. Raises `EngineUnavailable` if they never come or are no use."""
        if self._loading is None or (self._loading.done() and self._failed(self._loading)):
            self._loading = asyncio.create_task(self._load())
        return await asyncio.shield(self._loading)

    async def warm_up(self) -> None:
        """Load ahead of the first request. A failure is left for the request that runs into it."""
        with contextlib.suppress(FirstlightError):
            await self.ready()

    @property
    def max_model_len(self) -> int | None:
        """The context length if it is known by now."""
        if self._client.info is not None:
            return self._client.info.max_model_len
        return self._settings.engine.max_model_len

    @staticmethod
    def _failed(task: asyncio.Task[ModelText]) -> bool:
        return task.cancelled() or task.exception() is not None

    async def _load(self) -> ModelText:
        try:
            return await self._read_text()
        except EngineUnavailable:
            raise
        except FirstlightError as error:
            self._client.give_up(str(error))
            raise EngineUnavailable(str(error)) from error

    async def _read_text(self) -> ModelText:
        directory = await self._client.wait_directory()
        files = await asyncio.to_thread(self._read, directory)
        max_model_len, vocab_size = self.max_model_len, files.vocab_size
        if self._client.info is not None or max_model_len is None or vocab_size is None:
            # Only the engine knows for sure what families spell in their own ways.
            info = await self._client.wait_ready()
            max_model_len, vocab_size = info.max_model_len, info.vocab_size
        return files.with_limits(max_model_len, vocab_size, self._settings.engine.model)

    def _read(self, directory: Path) -> TextFiles:
        # Imported here, in a thread: the tokenizers' library takes longer to load than the server to answer.
        from runtime.text.model_text import TextFiles

        return TextFiles.read(directory, self._settings.chat_template)


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """The result of `work` on `size` characters, done in a thread when it would hold up the event loop."""
    return await asyncio.to_thread(work) if size > _INLINE_CHARACTERS else work()
