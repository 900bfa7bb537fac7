"""The turns of a conversation as requests spell them, and as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from handler.openai.errors import ApiError
from handler.openai.strict import Strict

MAX_MESSAGES = 4096
MAX_CALLS = 128
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")]


class TextPart(Strict):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str
    # Up to where other servers would keep what they have computed; here all of it is kept anyway.
    cache_control: dict[str, str] | None = None
    prompt_cache_breakpoint: dict[str, str] | None = None

    @field_validator("type", mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "text":
            raise ValueError(f"this model takes text alone, no '{value[:40]}'")
        return value


class RefusalPart(Strict):
    """A piece of an assistant's refusal that is sent back."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


TextParts = Annotated[list[TextPart], Field(fail_fast=True)]


class CalledFunction(Strict):
    """The function of a call; `arguments` is a JSON object as text, as the model wrote it."""

    name: FunctionName
    arguments: str
    # What the client's own helpers read in the arguments.
    parsed_arguments: Any = None


class ToolCall(Strict):
    """A call that the assistant made."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction
    # Only streams number their calls, but clients put what they gathered there into the history.
    index: int | None = None


class Instruction(Strict):
    """What the model is told beforehand."""

    role: Literal["system", "developer"]
    content: str | TextParts
    name: str | None = None


class Question(Strict):
    """What the user says."""

    role: Literal["user"]
    content: str | TextParts
    name: str | None = None


class Reply(Strict):
    """What the assistant said, called, or both."""

    role: Literal["assistant"]
    content: str | Annotated[list[TextPart | RefusalPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same by vLLM's newer name
    refusal: str | None = None
    # What the client's own helpers read in the content.
    parsed: Any = None
    # What else clients send back of an answer; only their empty values make sense here.
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolResult(Strict):
    """What came of a call."""

    role: Literal["tool"]
    content: str | TextParts
    tool_call_id: Annotated[str, Field(min_length=1, max_length=256)]
    name: str | None = None


Message = Annotated[Instruction | Question | Reply | ToolResult, Field(discriminator="role")]
Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


def as_turns(messages: Sequence[Instruction | Question | Reply | ToolResult]) -> list[dict[str, Any]]:
    """The messages as chat templates take them: contents in one piece, arguments as objects.

    Raises `ApiError` 400 for a message that says nothing, and for arguments that are no JSON object.
    """
    return [_as_turn(message, f"messages.{place}") for place, message in enumerate(messages)]


def _as_turn(message: Instruction | Question | Reply | ToolResult, param: str) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": _joined(message.content)}
    if message.name is not None:
        turn["name"] = message.name
    if isinstance(message, ToolResult):
        turn["tool_call_id"] = message.tool_call_id
    if isinstance(message, Reply):
        _add_reply(turn, message, param)
    return turn


def _add_reply(turn: dict[str, Any], message: Reply, param: str) -> None:
    if message.content is None and not message.tool_calls:
        turn["content"] = message.refusal
        if message.refusal is None:
            error = f"'{param}.content' is missing: only a message with 'tool_calls' can do without."
            raise ApiError(400, error, param=f"{param}.content", code="missing_required_parameter")
    reasoning = message.reasoning if message.reasoning_content is None else message.reasoning_content
    if reasoning is not None:
        turn["reasoning_content"] = reasoning
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": call_arguments(
                        call.function.arguments, f"{param}.tool_calls.{place}.function.arguments"
                    ),
                },
            }
            for place, call in enumerate(message.tool_calls)
        ]


def _joined(content: str | Sequence[TextPart | RefusalPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)


def call_arguments(text: str, param: str) -> dict[str, Any]:
    """The arguments of a call as an object. Raises `ApiError` 400 for any other text."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ApiError(400, f"'{param}' is not a JSON object.", param=param, code="invalid_value")
    return value
