"""The Python API: prompts in, results in order, no HTTP.

with LLM("HuggingFaceTB/SmolLM2-135M-Instruct") as llm:
    results = llm.chat([{"role": "user", "content": "Hello!"}], temperature=0)
    print(results[0].text, results.generation_info)
    for piece in llm.stream("Once upon a time", max_tokens=50):
        print(piece.text, end="", flush=True)
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator, Mapping
from collections.abc import Sequence as Items
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from runtime.catalogue import find_catalogue, load_catalogue
from runtime.client import EngineClient, EngineUnavailable
from runtime.errors import RequestError
from runtime.protocol import EngineConfig, Grammar, SleepLevel, Submit, TokenLogprobs
from runtime.text.bans import bans
from runtime.text.chat import encode_chat
from runtime.text.generation import run
from runtime.text.model_text import ModelText, TextFiles
from runtime.text.options import SamplingOptions
from runtime.text.sampling import answer_room, check_ids, sampling_params, truncated
from runtime.text.sequence import Sequence, TextDelta
from runtime.text.template import read_template
from runtime.weights.sources.cache import default_cache_dir

Messages = Items[Mapping[str, Any]]
Encode = Callable[[ModelText], list[list[int]]]
T = TypeVar("T")

# How long a continuation gets when nothing is said, as in OpenAI's API. A chat answer may fill the context.
_COMPLETION_TOKENS = 16


@dataclass(frozen=True)
class Result:
    """One answer.

    `token_ids` includes the id that ended it. `finish_reason` is "stop" or "length", `stop_reason` the
    stop string, or the request's own stop token id, that ended it. `logprobs` is empty unless asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None
    logprobs: list[TokenLogprobs]
    prompt_token_ids: list[int]


class Results(list[Result]):
    """The answers of one call in the order of its prompts, and what the call took.

    `generation_info` holds `num_prompt_tokens`, `num_generated_tokens`, `runtime` (in seconds, from the
    submission of the prompts to the last token, without loading), `samples/s` and `tokens/s`.
    """

    def __init__(self, results: Items[Result], generation_info: dict[str, float]) -> None:
        super().__init__(results)
        self.generation_info = generation_info


@dataclass(frozen=True)
class Piece:
    """What came next of the answer to prompt number `index`. The last one has a `finish_reason`."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None


class Stream:
    """The pieces of all answers of one call as they come. To leave the iteration early is to abort.

    `generation_info` says what was done so far; after the last piece it is that of `Results`.
    """

    def __init__(self, pieces: Generator[Piece], call: _Call) -> None:
        self._pieces = pieces
        self._call = call

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    @property
    def generation_info(self) -> dict[str, float]:
        """The tokens and speeds so far; see `Results`."""
        return self._call.info()

    def close(self) -> None:
        """Stop: the engine forgets what is still running."""
        self._pieces.close()


@dataclass
class _Call:
    """One call's sequences, when they were submitted and when they were last heard of."""

    encode: Encode
    options: SamplingOptions
    max_tokens: int | None
    sequences: list[Sequence] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0

    def info(self) -> dict[str, float]:
        generated = sum(sequence.generated for sequence in self.sequences)
        seconds = max(self.ended - self.began, 1e-9)
        return {
            "num_prompt_tokens": sum(len(s.submit.prompt_token_ids) for s in self.sequences),
            "num_generated_tokens": generated,
            "runtime": seconds,
            "samples/s": len(self.sequences) / seconds,
            "tokens/s": generated / seconds,
        }


class LLM:
    """One model in an engine process of its own. Safe to use from several threads.

    The engine starts at once and loads while the program goes on; the first call waits for it.
    Close the LLM, or use it in a `with` block, to end the engine.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        catalogue: str | Path | None = None,
        cache_dir: str | Path | None = None,
        revision: str | None = None,
        chat_template: str | None = None,
        tensor_parallel_size: int | None = None,
        **settings: Any,
    ) -> None:
        """`model` is an id from models.yaml, a Hub id, a folder, `s3://…`, `hf://…@revision`; None is the
        catalogue's default. `chat_template` is a Jinja template or a file with one; `settings` are the
        fields of `EngineConfig`: `max_model_len`, `dtype`, `device`, `max_num_seqs` and so on.

        Raises `FirstlightError` for a model that is not known, `TypeError` for settings that do not exist.
        """
        spec = load_catalogue(Path(catalogue) if catalogue else find_catalogue()).resolve(model)
        if revision is not None:
            spec = msgspec.structs.replace(spec, revision=revision)
        if tensor_parallel_size is not None:
            settings["world_size"] = tensor_parallel_size
        template = chat_template or spec.chat_template
        self._chat_template = read_template(template) if template else None
        config = EngineConfig.of(spec, str(cache_dir or default_cache_dir()), **settings)
        self._client = EngineClient(config)
        self._client.spawn()
        self._text: asyncio.Task[ModelText] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="firstlight", daemon=True)
        self._thread.start()
        self._spawn(self._client.run())

    # ---- calls ---------------------------------------------------------------------------------

    def generate(self, prompts: str | Items[int] | Items[str | Items[int]], **sampling: Any) -> Results:
        """Continue each prompt, a text or token ids. `sampling` are the fields of `SamplingOptions`.

        Raises `RequestError` for a prompt or an option that cannot be, before anything is computed, and
        `EngineUnavailable` if the engine cannot start or dies on the way.
        """
        return self._wait(self._whole(self._completion(prompts, sampling)))

    def chat(
        self,
        conversations: Messages | Items[Messages],
        *,
        tools: Items[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] = {},
        **sampling: Any,
    ) -> Results:
        """Answer each conversation, a list of `{"role": …, "content": …}`. Otherwise like `generate`."""
        template = {"tools": tools, "continue_final_message": continue_final_message, **chat_template_kwargs}
        return self._wait(self._whole(self._conversation(conversations, template, sampling)))

    def stream(
        self, prompts: str | Items[int] | Messages | Items[str | Items[int] | Messages], **sampling: Any
    ) -> Stream:
        """The answers piece by piece, to prompts as in `generate` or conversations as in `chat`."""
        if _is_conversation(prompts) or any(map(_is_conversation, prompts)):
            call = self._conversation(prompts, {}, sampling)
        else:
            call = self._completion(prompts, sampling)
        return Stream(self._pieces(call), call)

    def sleep(self, level: SleepLevel = 1) -> None:
        """Give back the device's memory when nothing runs any more; the next call takes it again.

        The weights wait in main memory at level 1, in their files at level 2. Raises `RequestError` for
        another level.
        """
        if level not in (1, 2):
            raise RequestError(f"A level of sleep is 1 or 2, not {level!r}.", "level")
        self._wait(self._sleep(level))

    def wake(self) -> None:
        """Take the memory back ahead of the next call."""
        self._wait(self._client.wake())

    def close(self) -> None:
        """End the engine and everything that runs on it."""
        if not self._loop.is_closed():
            self._wait(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- what a call asks for ------------------------------------------------------------------

    def _completion(self, prompts: Any, sampling: dict[str, Any]) -> _Call:
        single = isinstance(prompts, str) or (prompts and all(isinstance(item, int) for item in prompts))
        several = [prompts] if single else list(prompts)

        def encode(text: ModelText) -> list[list[int]]:
            return [_prompt_ids(prompt, text) for prompt in several]

        options = SamplingOptions.of(sampling)
        return _Call(encode, options, options.max_tokens or _COMPLETION_TOKENS)

    def _conversation(self, given: Any, template: dict[str, Any], sampling: dict[str, Any]) -> _Call:
        conversations = [given] if _is_conversation(given) else list(given)
        if not all(map(_is_conversation, conversations)):
            raise RequestError("A conversation is a list of messages, each a dict with role and content.")

        def encode(text: ModelText) -> list[list[int]]:
            if text.template is None:
                raise RequestError("This model has no chat template: use generate, or pass chat_template.")
            return [encode_chat(text.tokenizer, text.template, item, **template) for item in conversations]

        options = SamplingOptions.of(sampling)
        return _Call(encode, options, options.max_tokens)

    # ---- in the event loop's thread ------------------------------------------------------------

    async def _load_text(self) -> ModelText:
        directory = await self._client.wait_directory()
        files = await asyncio.to_thread(TextFiles.read, directory, self._chat_template)
        info = await self._client.wait_ready()
        return files.with_limits(info.max_model_len, info.vocab_size, self._client.config.model)

    async def _ready(self) -> ModelText:
        if self._text is None or (self._text.done() and self._text.exception() is not None):
            self._text = asyncio.create_task(self._load_text())
        return await asyncio.shield(self._text)

    async def _batches(self, call: _Call) -> AsyncGenerator[list[TextDelta]]:
        """Prepare a call's sequences and run them."""
        text = await self._ready()
        prompts = await asyncio.to_thread(call.encode, text)
        name = uuid.uuid4().hex
        form = call.options.structured_outputs
        grammar = None if form is None else Grammar(form.source(), "structured_outputs")
        options = call.options
        banned = bans(text.tokenizer, options.bad_words)
        for place, whole in enumerate(prompts):
            wanted = options.truncate_prompt_tokens
            prompt = truncated(whole, wanted, call.max_tokens, text.max_model_len)
            room = answer_room(len(prompt), options.max_tokens, text.max_model_len)
            room = min(room, call.max_tokens or room)
            params = sampling_params(
                options, text, max_tokens=room, logprobs=options.logprobs, banned=banned, grammar=grammar
            )
            submit = Submit(request_id=f"{name}-{place}", prompt_token_ids=prompt, sampling=params)
            call.sequences.append(Sequence(text.tokenizer, submit, call.options, place))
        await self._client.wait_ready()
        call.began = call.ended = time.perf_counter()
        async with aclosing(run(self._client, call.sequences)) as batches:
            async for batch in batches:
                call.ended = time.perf_counter()
                yield batch

    async def _whole(self, call: _Call) -> Results:
        async with aclosing(self._batches(call)) as batches:
            async for batch in batches:
                for delta in batch:
                    call.sequences[delta.place].keep(delta)
        results = []
        for sequence in call.sequences:
            kept = sequence.kept()
            assert kept.finish_reason is not None
            results.append(
                Result(
                    text=kept.text,
                    token_ids=kept.token_ids,
                    finish_reason=kept.finish_reason,
                    stop_reason=kept.stop_reason,
                    logprobs=kept.logprobs,
                    prompt_token_ids=sequence.submit.prompt_token_ids,
                )
            )
        return Results(results, call.info())

    async def _feed(self, call: _Call, pieces: queue.SimpleQueue[Piece | Exception | None]) -> None:
        try:
            async with aclosing(self._batches(call)) as batches:
                async for batch in batches:
                    for delta in batch:
                        pieces.put(Piece(delta.place, delta.text, delta.token_ids, delta.finish_reason))
        except Exception as error:  # handed over, to be raised where the pieces are taken
            pieces.put(error)
        finally:
            pieces.put(None)

    async def _sleep(self, level: SleepLevel) -> None:
        await self._client.wait_ready()
        await self._client.sleep(level)

    async def _end(self) -> None:
        await self._client.close(drain_seconds=0)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    # ---- in the caller's thread ----------------------------------------------------------------

    def _pieces(self, call: _Call) -> Generator[Piece]:
        pieces: queue.SimpleQueue[Piece | Exception | None] = queue.SimpleQueue()
        task = self._spawn(self._feed(call, pieces))
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._loop.is_closed():
            work.close()
            raise EngineUnavailable("This LLM has been closed.")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        task = self._spawn(work)
        try:
            return task.result()
        except BaseException:  # Ctrl-C, most of all: what nobody waits for is not computed
            task.cancel()
            raise


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], Mapping)


def _prompt_ids(prompt: str | Items[int], text: ModelText) -> list[int]:
    if isinstance(prompt, str):
        ids = text.tokenizer.encode(prompt)
    else:
        ids = list(prompt)
        check_ids(ids, text.vocab_size, "prompts")
    if not ids:
        raise RequestError("A prompt is empty; it needs at least one token.", "prompts")
    return ids
