"""POST /v1/responses."""

from __future__ import annotations

import time
import uuid
from typing import Any

import msgspec

from handler.openai.conversation import Conversation
from handler.openai.errors import ApiError
from handler.openai.logprobs import TokenNames, chat_content
from handler.openai.responses.items import as_turns
from handler.openai.responses.output import Event, Output
from handler.openai.responses.schema import NamedFunctionTool, ResponsesRequest
from handler.openai.schema import ChatOptions
from handler.openai.strict import parse
from handler.openai.structured import format_form
from handler.openai.tools import NamedFunction, offered
from handler.service import Service
from runtime.errors import RequestError
from runtime.text.sequence import Sequence, TextDelta

# What requests to both APIs call by the same name.
_SAME = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "seed", "stop", "parallel_tool_calls", "chat_template_kwargs"),
)
# What a conversation calls otherwise.
_OWN_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
}


class Responses:
    """Reads Responses requests."""

    route = "/v1/responses"
    operation = "chat"

    def __init__(self, service: Service) -> None:
        self.service = service

    def parse(self, body: Any) -> ResponsesAnswer:
        """The request in a decoded body. Raises `ApiError` for one that cannot be served."""
        request = parse(ResponsesRequest, body)
        if request.stream_options is not None and not request.stream:
            message = "'stream_options' is only valid together with 'stream': true."
            raise ApiError(400, message, param="stream_options", code="invalid_value")
        return ResponsesAnswer(self.service, request)


class ResponsesAnswer:
    """One Responses request on its way to its answer: a chat of one choice, told in other words."""

    num_sequences = 1

    def __init__(self, service: Service, request: ResponsesRequest) -> None:
        service.check_model(request.model)
        self.request = request
        self.stream = request.stream
        self.id = f"resp_{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = request.model or service.model
        self._scored = "message.output_text.logprobs" in request.include or bool(request.top_logprobs)
        choice = request.tool_choice
        named = NamedFunction(name=choice.name) if isinstance(choice, NamedFunctionTool) else choice
        offer = offered(request.tools, named, "tools.{}")
        turns = as_turns(request.instructions, request.input)
        wanted = request.text.format if request.text is not None else None
        form = None if wanted is None else format_form(wanted, "text.format")
        self._conversation = Conversation(service, self._options(), turns, offer, form, self.id)
        self._format = {"type": "text"} if wanted is None else _plain(wanted)
        self._output = Output()
        self._names: TokenNames | None = None
        self._sequence: Sequence | None = None
        self._waiting_scores: list[dict[str, Any]] = []
        self._number = 0
        self._finish: str | None = None

    def _options(self) -> ChatOptions:
        request = self.request
        given = {name: getattr(request, name) for name in _SAME}
        return ChatOptions(
            **given,
            max_completion_tokens=request.max_output_tokens,
            logprobs=self._scored,
            top_logprobs=request.top_logprobs,
            reasoning_effort=request.reasoning.effort if request.reasoning else None,
        )

    async def prepare(self) -> list[Sequence]:
        """Render and tokenize the input. Raises `ApiError` or `RequestError` for what cannot be."""
        try:
            text = await self._conversation.prepare()
        except (ApiError, RequestError) as error:
            raise _in_own_words(error) from None
        self._names = TokenNames(text.tokenizer)
        (self._sequence,) = self._conversation.sequences
        return [self._sequence]

    # ---- streamed ------------------------------------------------------------------------------

    def chunk(self, batch: list[TextDelta]) -> bytes:
        """The events for what has arrived."""
        head = b""
        if self._number == 0:
            head = self._encoded([self._told("response.created"), self._told("response.in_progress")])
        return head + self._encoded(self._grow(batch))

    def last(self) -> bytes:
        """The event after the output."""
        kind = "response.incomplete" if self._finish == "length" else "response.completed"
        return self._encoded([self._told(kind)])

    def failure(self, error: ApiError) -> bytes:
        """The events that end a stream which fails."""
        response = self._response("failed")
        response["error"] = {"code": "server_error", "message": str(error)}
        told = {"type": "error", "code": error.code, "message": str(error), "param": error.param}
        return self._encoded([told, {"type": "response.failed", "response": response}])

    def _told(self, kind: str) -> Event:
        return {"type": kind, "response": self._response(self._status())}

    def _encoded(self, events: list[Event]) -> bytes:
        lines = []
        for event in events:
            body = msgspec.json.encode({**event, "sequence_number": self._number})
            lines.append(b"event: " + event["type"].encode() + b"\ndata: " + body + b"\n\n")
            self._number += 1
        return b"".join(lines)

    # ---- whole ---------------------------------------------------------------------------------

    def add(self, batch: list[TextDelta]) -> None:
        """Keep what has arrived for `whole`."""
        self._grow(batch)

    def whole(self) -> bytes:
        """The answer in one piece."""
        return msgspec.json.encode(self._response(self._status()))

    # ---- both ----------------------------------------------------------------------------------

    def _grow(self, batch: list[TextDelta]) -> list[Event]:
        (reply,) = self._conversation.replies
        events: list[Event] = []
        for delta in batch:
            said = reply.read(delta)
            if said.reasoning:
                events += self._output.reasoning(said.reasoning)
            scores = self._scores(delta, behind_reasoning=not reply.reasons)
            if said.content:
                events += self._output.text(said.content, scores)
                self._waiting_scores = []
            for piece in said.calls:
                events += self._output.call(reply.calls[piece.index], piece.arguments)
            if delta.finish_reason is not None:
                self._finish = delta.finish_reason
                events += self._output.close("incomplete" if self._finish == "length" else "completed")
        return events

    def _scores(self, delta: TextDelta, *, behind_reasoning: bool) -> list[dict[str, Any]]:
        """The log-probabilities for the next piece of text, whose tokens may have come before it."""
        if self._scored and behind_reasoning and self._names is not None:
            self._waiting_scores += chat_content(delta.logprobs, self._names)
        return self._waiting_scores

    def _status(self) -> str:
        if self._finish is None:
            return "in_progress"
        return "incomplete" if self._finish == "length" else "completed"

    def _response(self, status: str) -> dict[str, Any]:
        request = self.request
        sampling = self._sequence.submit.sampling if self._sequence is not None else None
        cut = status == "incomplete"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata,
            "model": self.model,
            "output": self._output.items,
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": self._conversation.request.reasoning_effort, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": sampling.temperature if sampling else request.temperature,
            "text": {"format": self._format},
            "tool_choice": _plain(request.tool_choice),
            "tools": [{"strict": None, **_plain(tool)} for tool in request.tools],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": sampling.top_p if sampling else request.top_p,
            "truncation": "disabled",
            "usage": self._usage() if status in ("completed", "incomplete") else None,
        }

    def _usage(self) -> dict[str, Any]:
        sequence = self._sequence
        assert sequence is not None
        prompt = len(sequence.submit.prompt_token_ids)
        (reply,) = self._conversation.replies
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": sequence.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": sequence.generated,
            "output_tokens_details": {"reasoning_tokens": reply.reasoning_tokens},
            "total_tokens": prompt + sequence.generated,
        }


def _in_own_words(error: ApiError | RequestError) -> ApiError | RequestError:
    """An error about a field of the conversation, by the name that the field has here."""
    if name := _OWN_NAMES.get(error.param or ""):
        error.args = (str(error).replace(f"'{error.param}'", f"'{name}'"),)
        error.param = name
    return error


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else value.model_dump(exclude_none=True, by_alias=True)
