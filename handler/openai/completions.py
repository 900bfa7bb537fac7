"""POST /v1/completions."""

from __future__ import annotations

from typing import Any

import msgspec

from handler.openai.answer import BaseAnswer, encode
from handler.openai.errors import ApiError
from handler.openai.logprobs import CompletionLogprobs, TokenNames, extend, prompt_entries
from handler.openai.prompts import encode_prompts
from handler.openai.schema import CompletionRequest
from handler.openai.strict import parse
from handler.openai.structured import asked_form
from handler.service import Service
from runtime.protocol import Grammar, SamplingParams, Submit
from runtime.text.bans import Bans, bans
from runtime.text.grammar import source
from runtime.text.model_text import ModelText
from runtime.text.sampling import answer_room, sampling_params, truncated
from runtime.text.sequence import Sequence, TextDelta

DEFAULT_MAX_TOKENS = 16
MAX_SEQUENCES = 1024


class Completions:
    """Reads completion requests."""

    route = "/v1/completions"
    operation = "text_completion"

    def __init__(self, service: Service) -> None:
        self.service = service

    def parse(self, body: Any) -> CompletionAnswer:
        """The request in a decoded body. Raises `ApiError` for one that cannot be served."""
        request = parse(CompletionRequest, body)
        if request.best_of is not None and request.best_of < request.n:
            message = f"'best_of' ({request.best_of}) is less than 'n' ({request.n})."
            raise ApiError(400, message, param="best_of", code="invalid_value")
        if request.best_of not in (None, request.n) and request.stream:
            message = "'best_of' cannot be streamed: the best is known when all are complete."
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
        self._prompts: list[Any] = list(prompt) if several else [prompt]
        self._tries = request.best_of or request.n
        super().__init__(
            service,
            request,
            id_prefix="cmpl",
            chunk_object="text_completion",
            num_sequences=len(self._prompts) * self._tries,
        )
        self.request = request
        self._form = asked_form(request)
        self._choices: list[_Choice] = []
        added = request.echo or request.return_token_ids or request.logprobs is not None
        self._plain = not added and request.max_tokens != 0

    async def prepare(self) -> list[Sequence]:
        """Tokenize the prompts; `n` sequences (or `best_of`) for each of them, in order."""
        request = self.request
        text = await self.service.text.ready()
        prompts = await encode_prompts(text, self._prompts, request.add_special_tokens)
        banned = bans(text.tokenizer, request.bad_words)
        grammar = None
        if self._form is not None:
            grammar = Grammar(source(await self._form.part()), self._form.field)
        default = text.defaults.get("max_tokens", DEFAULT_MAX_TOKENS)
        # An answer of no tokens has no sampling step of its own: one token is made and not shown.
        wanted = max(1, default if request.max_tokens is None else request.max_tokens)
        for number, whole in enumerate(prompts):
            prompt = truncated(whole, request.truncate_prompt_tokens, wanted, text.max_model_len)
            shown = self._prompts[number] if len(prompt) == len(whole) else prompt
            # What nobody asked for gives way to a long prompt.
            asked = None if request.max_tokens is None else wanted
            room = min(wanted, answer_room(len(prompt), asked, text.max_model_len))
            sampling = self._sampling(text, room, banned, grammar)
            for turn in range(self._tries):
                place = number * self._tries + turn
                seed = None if sampling.seed is None else (sampling.seed + turn) % (1 << 63)
                submit = Submit(
                    request_id=f"{self.name}-{place}",
                    prompt_token_ids=prompt,
                    sampling=msgspec.structs.replace(sampling, seed=seed),
                    cache_salt=request.cache_salt or "",
                    priority=request.priority,
                )
                sequence = Sequence(text.tokenizer, submit, request, place, counts_prompt=turn == 0)
                self.sequences.append(sequence)
                self._choices.append(_Choice(request, text, shown, sequence))
        return self.sequences

    def _sampling(
        self, text: ModelText, max_tokens: int, banned: Bans, grammar: Grammar | None
    ) -> SamplingParams:
        request = self.request
        ranked = self._tries > request.n
        scored = request.logprobs if request.echo else None
        asked = request.prompt_logprobs
        return sampling_params(
            request,
            text,
            max_tokens=max_tokens,
            logprobs=0 if ranked and request.logprobs is None else request.logprobs,
            prompt_logprobs=asked if scored is None else max(scored, asked or 0),
            banned=banned,
            grammar=grammar,
        )

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
            if self._plain and delta.finish_reason is None:
                # What almost every event of almost every stream is.
                if delta.text:
                    head = b'[{"index":%d,"text":' % delta.place + encode(delta.text)
                    events.append(
                        self.event(head + b',"logprobs":null,"finish_reason":null,"stop_reason":null}]')
                    )
                continue
            choice = self._choices[delta.place].next(delta)
            grew = choice["text"] or choice["logprobs"] or choice.get("token_ids")
            if grew or delta.finish_reason is not None:
                events.append(self.event(b"[" + encode(choice) + b"]"))
        return b"".join(events)

    def add(self, batch: list[TextDelta]) -> None:
        """Keep what has arrived for `whole`."""
        for delta in batch:
            self._choices[delta.place].keep(delta)

    def whole(self) -> bytes:
        """The answer in one piece: of each prompt's choices the best, likeliest by token first."""
        n, tries = self.request.n, self._tries
        shown = []
        for start in range(0, len(self._choices), tries):
            choices = self._choices[start : start + tries]
            if tries > n:
                choices = sorted(choices, key=_Choice.score, reverse=True)[:n]
            shown += [choice.whole() for choice in choices]
        numbered = [choice | {"index": index} for index, choice in enumerate(shown)]
        return encode(self.envelope("text_completion", numbered))


class _Choice:
    """One choice: its text with, where asked for, the prompt in front and log-probabilities."""

    def __init__(
        self, request: CompletionRequest, text: ModelText, prompt: str | list[int], sequence: Sequence
    ) -> None:
        self._request = request
        self._tokenizer = text.tokenizer
        self._prompt = prompt
        self._sequence = sequence
        self._names = TokenNames(text.tokenizer, as_ids=request.return_tokens_as_token_ids)
        self._logprobs = CompletionLogprobs(self._names, request.logprobs or 0)
        self._begun = False
        self._pieces: list[dict[str, Any]] = []
        self._scores: list[float] = []

    def next(self, delta: TextDelta) -> dict[str, Any]:
        """The next piece as OpenAI's streams show it."""
        request = self._request
        shown = request.max_tokens != 0
        ids = {"prompt_token_ids": self._sequence.submit.prompt_token_ids} if not self._begun else {}
        text, scores = self._begin() if not self._begun else ("", None)
        if shown:
            text += delta.text
            if request.logprobs is not None:
                piece = self._logprobs.take(delta.logprobs)
                scores = extend(scores, piece) if delta.logprobs or scores is None else scores
        if scores is not None and not scores["tokens"]:
            scores = None
        choice = {
            "index": self._sequence.place,
            "text": text,
            "logprobs": scores,
            "finish_reason": delta.finish_reason if shown or delta.finish_reason is None else "length",
            "stop_reason": delta.stop_reason if shown else None,
        }
        if request.return_token_ids:
            choice |= {**ids, "token_ids": delta.token_ids if shown else []}
        return choice

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
        self._scores += [entry.logprob for entry in delta.logprobs]

    def score(self) -> float:
        """The log-probability by token, by which the best choice is found; see `best_of`."""
        return sum(self._scores) / len(self._scores) if self._scores else float("-inf")

    def whole(self) -> dict[str, Any]:
        """All pieces in one, with the prompt's own log-probabilities where they were asked for."""
        first, last = self._pieces[0], self._pieces[-1]
        scores: dict[str, Any] | None = None
        for piece in self._pieces:
            if piece["logprobs"] is not None:
                scores = extend(scores, piece["logprobs"])
        choice = {
            **first,
            **last,
            "text": "".join(piece["text"] for piece in self._pieces),
            "logprobs": scores,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = [index for piece in self._pieces for index in piece["token_ids"]]
        asked = self._request.prompt_logprobs
        entries = self._sequence.prompt_logprobs
        choice["prompt_logprobs"] = None if asked is None else prompt_entries(entries, self._names, asked)
        return choice
