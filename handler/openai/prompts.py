"""Prompts and conversations -> token ids, in a thread where they are long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from handler.openai.errors import ApiError
from handler.openai.schema import Message
from handler.textroom import off_loop
from runtime.text.chat import encode_chat
from runtime.text.model_text import ModelText
from runtime.text.sampling import check_ids


async def encode_messages(
    text: ModelText,
    messages: list[Message],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    add_special_tokens: bool,
) -> list[int]:
    """The prompt that a conversation makes. Raises `ApiError` or `RequestError` if it makes none."""
    template = text.template
    if template is None:
        message = "This model has no chat template: use /v1/completions, or serve it with --chat-template."
        raise ApiError(400, message, param="messages", code="no_chat_template")
    turns = [_as_turn(message) for message in messages]

    def work() -> list[int]:
        ids = encode_chat(
            text.tokenizer,
            template,
            turns,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return [*text.tokenizer.encode(""), *ids] if add_special_tokens else ids

    size = sum(len(turn["content"]) for turn in turns)
    return _not_empty(await off_loop(size, work), "messages")


async def encode_prompts(
    text: ModelText,
    prompts: Sequence[str | list[int]],
    add_special_tokens: bool,
    *,
    allow_empty: bool = False,
) -> list[list[int]]:
    """The token ids of each prompt; ids that are given as such are checked and kept."""
    for prompt in prompts:
        if not isinstance(prompt, str):
            check_ids(prompt, text.vocab_size, "prompt")

    def work() -> list[list[int]]:
        return [
            text.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
            if isinstance(prompt, str)
            else prompt
            for prompt in prompts
        ]

    encoded = await off_loop(sum(map(len, prompts)), work)
    return encoded if allow_empty else [_not_empty(ids, "prompt") for ids in encoded]


def _as_turn(message: Message) -> dict[str, Any]:
    turn = {"role": message.role, "content": message.text}
    if message.name is not None:
        turn["name"] = message.name
    return turn


def _not_empty(ids: list[int], param: str) -> list[int]:
    if not ids:
        raise ApiError(400, "The prompt is empty.", param=param, code="invalid_value")
    return ids
