"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

import msgspec

from handler.openai import logprobs
from handler.openai.answer import BaseAnswer, encode
from handler.openai.errors import ApiError
from handler.openai.prompts import encode_messages
from handler.openai.schema import ChatRequest, parse
from handler.service import Service
from runtime.protocol import Submit, TokenLogprobs
from runtime.text.model_text import ModelText
from runtime.text.sampling import answer_room, sampling_params
from runtime.text.sequence import Sequence, TextDelta


class ChatCompletions:
    """Reads chat requests."""

    route = "/v1/chat/completions"

    def __init__(self, service: Service) -> None:
        self.service = service

    def parse(self, body: Any) -> ChatAnswer:
        """The request in a decoded body. Raises `ApiError` for one that cannot be served."""
        request = parse(ChatRequest, body)
        if request.top_logprobs is not None and not request.logprobs:
            message = "'top_logprobs' is only valid together with 'logprobs': true."
            raise ApiError(400, message, param="top_logprobs", code="invalid_value")
        return ChatAnswer(self.service, request)


class ChatAnswer(BaseAnswer):
    """One chat request on its way to its answer."""

    def __init__(self, service: Service, request: ChatRequest) -> None:
        super().__init__(service, request, id_prefix="chatcmpl", chunk_object="chat.completion.chunk")
        self.request = request
        self._told_role = False
        self._text: ModelText | None = None

    async def prepare(self) -> list[Sequence]:
        """Render and tokenize the messages; one sequence for each of the `n` choices."""
        request = self.request
        text = self._text = await self.service.text.ready()
        prompt = await encode_messages(
            text,
            request.messages,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            add_special_tokens=request.add_special_tokens,
        )
        asked = request.max_completion_tokens or request.max_tokens
        param = "messages" if asked is None else "max_tokens"
        room = answer_room(len(prompt), asked, text.max_model_len, param)
        sampling = sampling_params(
            request,
            text,
            max_tokens=room if asked else min(room, text.defaults.get("max_tokens", room)),
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            prompt_logprobs=request.prompt_logprobs,
        )
        for place in range(request.n):
            seed = None if sampling.seed is None else (sampling.seed + place) % (1 << 63)
            submit = Submit(
                request_id=f"{self.id}-{place}",
                prompt_token_ids=prompt,
                sampling=msgspec.structs.replace(sampling, seed=seed),
                cache_salt=request.cache_salt,
            )
            self.sequences.append(Sequence(text.tokenizer, submit, request, place, counts_prompt=place == 0))
        return self.sequences

    def chunk(self, batch: list[TextDelta]) -> bytes:
        """The events for what has arrived: the roles first, then one for each choice that grew or ended."""
        events = []
        if not self._told_role:
            self._told_role = True
            for place in range(len(self.sequences)):
                head = b'[{"index":%d,"delta":{"role":"assistant","content":""}' % place
                events.append(self.event(head + b',"logprobs":null,"finish_reason":null}]'))
        events += [
            self.event(self._choice(delta))
            for delta in batch
            if delta.text or delta.logprobs or delta.finish_reason is not None
        ]
        return b"".join(events)

    def _choice(self, delta: TextDelta) -> bytes:
        content = b'{"content":' + encode(delta.text) + b"}" if delta.text else b"{}"
        choice = b'[{"index":%d,"delta":' % delta.place + content
        choice += b',"logprobs":' + encode(self._logprobs(delta.logprobs))
        if delta.finish_reason is None:
            return choice + b',"finish_reason":null}]'
        finish = b',"finish_reason":' + encode(delta.finish_reason)
        return choice + finish + b',"stop_reason":' + encode(delta.stop_reason) + b"}]"

    def _logprobs(self, entries: list[TokenLogprobs]) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None
        assert self._text is not None
        return {"content": logprobs.chat_content(entries, self._text.tokenizer)}

    def add(self, batch: list[TextDelta]) -> None:
        """Keep what has arrived for `whole`."""
        for delta in batch:
            self.sequences[delta.place].keep(delta)

    def whole(self) -> bytes:
        """The answer in one piece."""
        choices = []
        for sequence in self.sequences:
            kept = sequence.kept()
            message: dict[str, Any] = {
                "role": "assistant",
                "content": kept.text,
                "refusal": None,
                "reasoning_content": None,
                "tool_calls": [],
            }
            choices.append(
                {
                    "index": sequence.place,
                    "message": message,
                    "logprobs": self._logprobs(kept.logprobs),
                    "finish_reason": kept.finish_reason,
                    "stop_reason": kept.stop_reason,
                }
            )
        answer = self.envelope("chat.completion", choices)
        answer["prompt_logprobs"] = self._prompt_logprobs()
        return encode(answer)

    def _prompt_logprobs(self) -> list[dict[str, Any] | None] | None:
        if self.request.prompt_logprobs is None:
            return None
        assert self._text is not None
        entries = self.sequences[0].prompt_logprobs
        return list(logprobs.prompt_entries(entries, self._text.tokenizer, self.request.prompt_logprobs))
