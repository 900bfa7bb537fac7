"""The served model's text side: tokenizer, chat template, limits and sampling defaults.

All of it comes from the model's small files, which are there long before its weights; so prompts are
tokenized, and requests are on their way to the engine, while the engine is still loading.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from runtime.client import EngineClient
from runtime.errors import FirstlightError

if TYPE_CHECKING:
    from handler.settings import ServerSettings
    from runtime.text.template import ChatTemplate
    from runtime.text.tokenizer import Tokenizer

# Up to here, work on text is quicker than handing it to a thread.
_INLINE_CHARACTERS = 2000
T = TypeVar("T")


@dataclass(frozen=True)
class ModelText:
    """What is known about the model from its small files. Lengths are in tokens."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    vocab_size: int


class TextRoom:
    """Loads the model's text side once, as soon as its files are there, and keeps it."""

    def __init__(self, client: EngineClient, settings: ServerSettings) -> None:
        self._client = client
        self._settings = settings
        self._loading: asyncio.Task[ModelText] | None = None

    async def ready(self) -> ModelText:
        """The text side; waits for the files. Raises `EngineUnavailable` if they never come."""
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
        directory = await self._client.wait_directory()
        tokenizer, template = await asyncio.to_thread(self._read, directory)
        config = _read_json(directory / "config.json")
        generation = _read_json(directory / "generation_config.json")
        max_model_len, vocab_size = self.max_model_len, config.get("vocab_size")
        if self._client.info is not None or max_model_len is None or not isinstance(vocab_size, int):
            # Only the engine knows for sure what families spell in their own ways.
            info = await self._client.wait_ready()
            max_model_len, vocab_size = info.max_model_len, info.vocab_size
        return ModelText(
            tokenizer=tokenizer,
            template=template,
            defaults={**generation, **self._settings.engine.model.generation},
            eos_token_ids=tuple(sorted(tokenizer.eos_token_ids)),
            max_model_len=max_model_len,
            vocab_size=vocab_size,
        )

    def _read(self, directory: Path) -> tuple[Tokenizer, ChatTemplate | None]:
        from runtime.text.template import ChatTemplate
        from runtime.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(directory)
        own = self._settings.chat_template
        if own is not None:
            return tokenizer, ChatTemplate(own, special_tokens=tokenizer.special_tokens)
        return tokenizer, ChatTemplate.of(tokenizer)


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """The result of `work` on `size` characters, done in a thread when it would hold up the event loop."""
    return await asyncio.to_thread(work) if size > _INLINE_CHARACTERS else work()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    return value if isinstance(value, dict) else {}
