"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from handler.openai.answer import BaseAnswer, encode
from handler.openai.conversation import Conversation, Reply
from handler.openai.errors import ApiError
from handler.openai.logprobs import TokenNames, chat_content, prompt_entries
from handler.openai.messages import as_turns
from handler.openai.reply.said import CallDelta, Said
from handler.openai.schema import ChatRequest
from handler.openai.strict import parse
from handler.openai.structured import asked_form
from handler.openai.tools import NamedTool, offered
from handler.service import Service
from runtime.protocol import TokenLogprobs
from runtime.text.sequence import Sequence, TextDelta


class ChatCompletions:
    """Reads chat requests."""

    route = "/v1/chat/completions"
    operation = "chat"

    def __init__(self, service: Service) -> None:
        self.service = service

    def parse(self, body: Any) -> ChatAnswer:
        """The request in a decoded body. Raises `ApiError` for one that cannot be served."""
        request = parse(ChatRequest, body)
        if request.top_logprobs and not request.logprobs:
            message = "'top_logprobs' is only valid together with 'logprobs': true."
            raise ApiError(400, message, param="top_logprobs", code="invalid_value")
        given = request.model_fields_set
        if (
            request.continue_final_message
            and request.add_generation_prompt
            and ("add_generation_prompt" in given)
        ):
            message = "'continue_final_message' and 'add_generation_prompt' contradict each other."
            raise ApiError(400, message, param="continue_final_message", code="invalid_value")
        return ChatAnswer(self.service, request)


class ChatAnswer(BaseAnswer):
    """One chat request on its way to its answer."""

    def __init__(self, service: Service, request: ChatRequest) -> None:
        super().__init__(
            service,
            request,
            id_prefix="chatcmpl",
            chunk_object="chat.completion.chunk",
            num_sequences=request.n,
        )
        self.request = request
        choice = request.tool_choice
        offer = offered(
            [tool.function for tool in request.tools],
            choice.function if isinstance(choice, NamedTool) else choice,
        )
        turns, form = as_turns(request.messages), asked_form(request)
        self._conversation = Conversation(service, request, turns, offer, form, self.name)
        self._names: TokenNames | None = None
        self._told_role = False
        self._plain = not (request.logprobs or request.return_token_ids)

    async def prepare(self) -> list[Sequence]:
        """Render and tokenize the messages; one sequence for each of the `n` choices."""
        text = await self._conversation.prepare()
        self._names = TokenNames(text.tokenizer, as_ids=self.request.return_tokens_as_token_ids)
        self.sequences = self._conversation.sequences
        return self.sequences

    def usage(self) -> dict[str, Any]:
        """How many tokens there are by now, and how many of a model that reasons were reasoning."""
        usage = super().usage()
        replies = self._conversation.replies
        if any(reply.can_reason for reply in replies):
            reasoning = sum(reply.reasoning_tokens for reply in replies)
            usage["completion_tokens_details"] = {"reasoning_tokens": reasoning}
        return usage

    # ---- streamed ------------------------------------------------------------------------------

    def chunk(self, batch: list[TextDelta]) -> bytes:
        """The events for what has arrived: the roles first, then one for each choice that grew or ended."""
        events = []
        if not self._told_role:
            self._told_role = True
            events += [self._role(place) for place in range(len(self.sequences))]
        for delta in batch:
            reply = self._conversation.replies[delta.place]
            said = reply.read(delta)
            tokens = delta.token_ids if self.request.return_token_ids else []
            if said or delta.logprobs or tokens or delta.finish_reason is not None:
                events.append(self.event(self._choice(delta, reply, said)))
        return b"".join(events)

    def _role(self, place: int) -> bytes:
        head = b'[{"index":%d,"delta":{"role":"assistant","content":""}' % place
        extra: dict[str, Any] = {}
        if self.request.return_token_ids:
            extra["prompt_token_ids"] = self.sequences[0].submit.prompt_token_ids
        return self.event(head + b',"logprobs":null,"finish_reason":null}]', **extra)

    def _choice(self, delta: TextDelta, reply: Reply, said: Said) -> bytes:
        if self._plain and delta.finish_reason is None and not (said.reasoning or said.calls):
            # What almost every event of almost every stream is.
            head = b'[{"index":%d,"delta":{"content":' % delta.place
            return head + encode(said.content) + b'},"logprobs":null,"finish_reason":null}]'
        added: dict[str, Any] = {}
        if said.reasoning:
            added["reasoning_content"] = said.reasoning
        if said.content or not (said.reasoning or said.calls):
            # Also where there is none: many a client prints the content of every event, the last one's too.
            added["content"] = said.content
        if said.calls:
            added["tool_calls"] = [_call_delta(piece, reply) for piece in said.calls]
        choice = {
            "index": delta.place,
            "delta": added,
            "logprobs": self._logprobs(delta.logprobs),
            "finish_reason": reply.finish_reason(delta),
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self.request.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return b"[" + encode(choice) + b"]"

    # ---- whole ---------------------------------------------------------------------------------

    def add(self, batch: list[TextDelta]) -> None:
        """Keep what has arrived for `whole`."""
        for delta in batch:
            self.sequences[delta.place].keep(delta)
            self._conversation.replies[delta.place].read(delta)

    def whole(self) -> bytes:
        """The answer in one piece."""
        replies = zip(self.sequences, self._conversation.replies, strict=True)
        choices = [self._whole_choice(sequence, reply) for sequence, reply in replies]
        answer = self.envelope("chat.completion", choices)
        answer["prompt_logprobs"] = self._prompt_logprobs()
        if self.request.return_token_ids:
            answer["prompt_token_ids"] = self.sequences[0].submit.prompt_token_ids
        return encode(answer)

    def _whole_choice(self, sequence: Sequence, reply: Reply) -> dict[str, Any]:
        kept = sequence.kept()
        silent = not reply.content and (reply.calls or reply.reasoning)
        message = {
            "role": "assistant",
            "content": None if silent else reply.content,
            "refusal": None,
            "reasoning_content": reply.reasoning or None,
            "tool_calls": [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in reply.calls
            ],
        }
        choice = {
            "index": sequence.place,
            "message": message,
            "logprobs": self._logprobs(kept.logprobs),
            "finish_reason": reply.finish_reason(kept),
            "stop_reason": kept.stop_reason,
        }
        return choice | {"token_ids": kept.token_ids} if self.request.return_token_ids else choice

    # ---- scores --------------------------------------------------------------------------------

    def _logprobs(self, entries: list[TokenLogprobs]) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None
        assert self._names is not None
        return {"content": chat_content(entries, self._names), "refusal": None}

    def _prompt_logprobs(self) -> list[dict[str, Any] | None] | None:
        if self.request.prompt_logprobs is None:
            return None
        assert self._names is not None
        entries = self.sequences[0].prompt_logprobs
        return list(prompt_entries(entries, self._names, self.request.prompt_logprobs))


def _call_delta(piece: CallDelta, reply: Reply) -> dict[str, Any]:
    if piece.name is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.index, "id": reply.calls[piece.index].id, "type": "function", "function": function}
