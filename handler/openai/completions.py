"""POST /v1/completions."""

from __future__ import annotations

from typing import Any

import msgspec

from handler.openai import logprobs
from handler.openai.answer import BaseAnswer, encode
from handler.openai.errors import ApiError
from handler.openai.logprobs import CompletionLogprobs, extend
from handler.openai.prompts import encode_prompts
from handler.openai.schema import CompletionRequest, parse
from handler.service import Service
from runtime.protocol import Submit
from runtime.text.model_text import ModelText
from runtime.text.sampling import answer_room, sampling_params
from runtime.text.sequence import Sequence, TextDelta

DEFAULT_MAX_TOKENS = 16
MAX_SEQUENCES = 1024


class Completions:
    """Reads completion requests."""

    route = "/v1/completions"

    def __init__(self, service: Service) -> None:
        self.service = service

    def parse(self, body: Any) -> CompletionAnswer:
        """The request in a decoded body. Raises `ApiError` for one that cannot be served."""
        request = parse(CompletionRequest, body)
        if request.best_of not in (None, request.n):
            message = f"'best_of' is supported only with the value of 'n' ({request.n})."
            raise ApiError(400, message, param="best_of", code="unsupported_value")
        if request.max_tokens == 0 and not request.echo:
            message = "'max_tokens': 0 leaves nothing to answer unless 'echo' is true."
            raise ApiError(400, message, param="max_tokens", code="invalid_value")
        answer = CompletionAnswer(self.service, request)
        if answer.num_sequences > MAX_SEQUENCES:
            message = f"The request asks for {answer.num_sequences} choices; {MAX_SEQUENCES} is the most."
            raise ApiError(400, message, param="n", code="invalid_value")
        return answer


class CompletionAnswer(BaseAnswer):
    """One completion request on its way to its answer."""

    def __init__(self, service: Service, request: CompletionRequest) -> None:
        prompt = request.prompt
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        super().__init__(
            service,
            request,
            id_prefix="cmpl",
            chunk_object="text_completion",
            prompts=len(prompt) if several else 1,
        )
        self.request = request
        self._prompts: list[Any] = list(prompt) if several else [prompt]
        self._choices: list[_Choice] = []
        self._text: ModelText | None = None

    async def prepare(self) -> list[Sequence]:
        """Tokenize the prompts; `n` sequences for each of them, in order."""
        request = self.request
        text = self._text = await self.service.text.ready()
        prompts = await encode_prompts(text, self._prompts, request.add_special_tokens)
        scored = request.logprobs if request.echo else None
        asked = request.prompt_logprobs
        for number, prompt in enumerate(prompts):
            default = text.defaults.get("max_tokens", DEFAULT_MAX_TOKENS)
            wanted = default if request.max_tokens is None else request.max_tokens
            # An answer of no tokens has no sampling step of its own: one token is made and not shown.
            room = answer_room(len(prompt), max(1, wanted), text.max_model_len, "max_tokens")
            sampling = sampling_params(
                request,
                text,
                max_tokens=room,
                logprobs=request.logprobs,
                prompt_logprobs=asked if scored is None else max(scored, asked or 0),
            )
            for turn in range(request.n):
                place = number * request.n + turn
                seed = None if sampling.seed is None else (sampling.seed + turn) % (1 << 63)
                submit = Submit(
                    request_id=f"{self.id}-{place}",
                    prompt_token_ids=prompt,
                    sampling=msgspec.structs.replace(sampling, seed=seed),
                    cache_salt=request.cache_salt,
                )
                self.sequences.append(
                    Sequence(text.tokenizer, submit, request, place, counts_prompt=turn == 0)
                )
                self._choices.append(_Choice(request, text, self._prompts[number], self.sequences[-1]))
        return self.sequences

    def usage(self) -> dict[str, Any]:
        """How many tokens there are by now; a token that is not shown is not counted."""
        if self.request.max_tokens == 0:
            for sequence in self.sequences:
                sequence.generated = 0
        return super().usage()

    def chunk(self, batch: list[TextDelta]) -> bytes:
        """One event for each choice that grew or ended."""
        events = []
        for delta in batch:
            choice = self._choices[delta.place].next(delta)
            if choice["text"] or choice["logprobs"] or delta.finish_reason is not None:
                events.append(self.event(b"[" + encode(choice) + b"]"))
        return b"".join(events)

    def add(self, batch: list[TextDelta]) -> None:
        """Keep what has arrived for `whole`."""
        for delta in batch:
            self._choices[delta.place].keep(delta)

    def whole(self) -> bytes:
        """The answer in one piece."""
        return encode(self.envelope("text_completion", [choice.whole() for choice in self._choices]))


class _Choice:
    """One choice: its text with, where asked for, the prompt in front and log-probabilities."""

    def __init__(
        self, request: CompletionRequest, text: ModelText, prompt: str | list[int], sequence: Sequence
    ) -> None:
        self._request = request
        self._tokenizer = text.tokenizer
        self._prompt = prompt
        self._sequence = sequence
        self._logprobs = CompletionLogprobs(text.tokenizer, request.logprobs or 0)
        self._begun = False
        self._pieces: list[dict[str, Any]] = []

    def next(self, delta: TextDelta) -> dict[str, Any]:
        """The next piece as OpenAI's streams show it."""
        text, scores = self._begin() if not self._begun else ("", None)
        if self._request.max_tokens != 0:
            text += delta.text
            if self._request.logprobs is not None:
                piece = self._logprobs.take(delta.logprobs)
                scores = extend(scores, piece) if delta.logprobs or scores is None else scores
        if scores is not None and not scores["tokens"]:
            scores = None
        length = self._request.max_tokens == 0 and delta.finish_reason is not None
        return {
            "index": self._sequence.place,
            "text": text,
            "logprobs": scores,
            "finish_reason": "length" if length else delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    def _begin(self) -> tuple[str, dict[str, Any] | None]:
        self._begun = True
        if not self._request.echo:
            return "", None
        ids = self._sequence.submit.prompt_token_ids
        text = self._prompt if isinstance(self._prompt, str) else self._tokenizer.decode(ids)
        if self._request.logprobs is None:
            return text, None
        known = [entry for entry in self._sequence.prompt_logprobs if entry is not None]
        return text, self._logprobs.take(known, first=ids[: len(ids) - len(known)])

    def keep(self, delta: TextDelta) -> None:
        """Put a piece aside for `whole`."""
        self._pieces.append(self.next(delta))

    def whole(self) -> dict[str, Any]:
        """All pieces in one, with the prompt's own log-probabilities where they were asked for."""
        scores: dict[str, Any] | None = None
        for piece in self._pieces:
            if piece["logprobs"] is not None:
                scores = extend(scores, piece["logprobs"])
        choice = {
            **self._pieces[-1],
            "text": "".join(piece["text"] for piece in self._pieces),
            "logprobs": scores,
        }
        asked = self._request.prompt_logprobs
        entries = self._sequence.prompt_logprobs
        choice["prompt_logprobs"] = (
            None if asked is None else logprobs.prompt_entries(entries, self._tokenizer, asked)
        )
        return choice
