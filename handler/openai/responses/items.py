"""The items of a Responses request -> the turns that chat templates take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from handler.openai.errors import ApiError
from handler.openai.messages import call_arguments
from handler.openai.responses.schema import (
    FunctionCall,
    FunctionCallOutput,
    InputMessage,
    InputText,
    Item,
    ItemReference,
    OutputText,
    ReasoningItem,
    ReasoningText,
    Refusal,
)


def as_turns(instructions: str | None, given: str | Sequence[Item]) -> list[dict[str, Any]]:
    """The conversation's turns.

    Raises `ApiError` 400 for arguments that are no JSON object, and for what refers to an earlier response.

    What the model put out in one go (reasoning, text, calls) comes as several items and is one turn.
    """
    turns: list[dict[str, Any]] = []
    if instructions is not None:
        turns.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*turns, {"role": "user", "content": given}]
    for place, item in enumerate(given):
        match item:
            case InputMessage():
                _add_message(turns, item)
            case FunctionCall():
                function = {
                    "name": item.name,
                    "arguments": call_arguments(item.arguments, f"input.{place}.arguments"),
                }
                call = {"id": item.call_id, "type": "function", "function": function}
                _assistant(turns).setdefault("tool_calls", []).append(call)
            case FunctionCallOutput():
                content = _joined(item.output)
                turns.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
            case ReasoningItem():
                parts = item.content or item.summary
                turns.append({"role": "assistant", "content": "", "reasoning_content": _joined(parts)})
            case ItemReference():
                message = (
                    f"'input.{place}' refers to the item '{item.id}' of an earlier response, but responses "
                    "are not kept here: send the item itself, as clients do with 'store': false."
                )
                raise ApiError(400, message, param=f"input.{place}", code="unsupported_value")
    return turns


def _add_message(turns: list[dict[str, Any]], message: InputMessage) -> None:
    content = _joined(message.content)
    if message.role == "assistant" and turns and turns[-1].keys() == {"role", "content", "reasoning_content"}:
        turns[-1]["content"] = content
    else:
        turns.append({"role": message.role, "content": content})


def _assistant(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's turn that is going on, or a new one."""
    if not turns or turns[-1]["role"] != "assistant":
        turns.append({"role": "assistant", "content": ""})
    return turns[-1]


def _joined(content: str | Sequence[InputText | OutputText | Refusal | ReasoningText]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
