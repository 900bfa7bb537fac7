"""Prompts and conversations -> token ids, in a thread where they are long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from handler.openai.errors import ApiError
from handler.openai.reply.formats import CallFormat
from handler.openai.tools import in_plain_text, with_fitting_ids
from handler.textroom import off_loop
from runtime.errors import RequestError
from runtime.text.chat import encode_chat
from runtime.text.model_text import ModelText
from runtime.text.sampling import check_ids
from runtime.text.template import ChatTemplate

# What a request says in fields of its own, or not at all.
_RESERVED = {
    *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
    *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"),
    *("tokenizer", "template", "piece_boundary"),
}


async def encode_messages(
    text: ModelText,
    turns: list[dict[str, Any]],
    *,
    tools: Sequence[dict[str, Any]] = (),
    call_format: CallFormat | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    add_special_tokens: bool = False,
    variables: Mapping[str, Any] = {},
) -> list[int]:
    """The prompt that a conversation makes. Raises `ApiError` or `RequestError` if it makes none.

    `variables` are the template's own; a developer's turns are the system's for a template that knows none.
    """
    template = _template(text)
    _check_variables(template, variables)
    if not template.mentions("developer"):
        turns = [turn | {"role": "system"} if turn["role"] == "developer" else turn for turn in turns]
    uses_tools = bool(tools) or any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns)

    def encode(turns: list[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> list[int]:
        ids = encode_chat(
            text.tokenizer,
            template,
            turns,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **variables,
        )
        return [*text.tokenizer.encode(""), *ids] if add_special_tokens else ids

    def work() -> list[int]:
        if not uses_tools:
            return encode(turns, None)
        if "tools" in template.variables:
            return encode(with_fitting_ids(turns, call_format), tools or None)
        try:
            return encode(in_plain_text(turns, tools, as_system=True), None)
        except RequestError:  # a template that refuses a system turn
            return encode(in_plain_text(turns, tools, as_system=False), None)

    size = sum(len(turn["content"]) for turn in turns) + 1000 * len(tools)
    return _not_empty(await off_loop(size, work), "messages")


def template_variables(
    text: ModelText, given: Mapping[str, Any], documents: list[dict[str, str]], effort: str | None
) -> dict[str, Any]:
    """The template's variables that a request sets, by whatever field. Raises `ApiError` 400 for others."""
    known = _template(text).variables
    variables = dict(given)
    if documents:
        if "documents" not in known:
            raise _unsupported("documents", "this model's chat template has no place for documents")
        variables["documents"] = documents
    if effort is not None:
        if "reasoning_effort" in known:
            variables["reasoning_effort"] = effort
        elif effort == "none" and "enable_thinking" in known:
            variables["enable_thinking"] = False
        elif effort != "none":
            raise _unsupported("reasoning_effort", "this model's reasoning has no degrees")
    return variables


def _template(text: ModelText) -> ChatTemplate:
    if text.template is None:
        message = "This model has no chat template: use /v1/completions, or serve it with --chat-template."
        raise ApiError(400, message, param="messages", code="no_chat_template")
    return text.template


def _check_variables(template: ChatTemplate, variables: Mapping[str, Any]) -> None:
    settable = template.variables - _RESERVED - template.special_tokens.keys()
    unknown = sorted(variables.keys() - settable - {"documents"})
    if unknown:
        others = ", ".join(sorted(settable)) or "none"
        message = (
            f"'chat_template_kwargs' holds '{unknown[0][:100]}', which this model's chat template does not "
            f"take; it takes: {others}."
        )
        raise ApiError(400, message, param="chat_template_kwargs", code="unsupported_value")


def _unsupported(param: str, why: str) -> ApiError:
    message = f"'{param}' cannot be met: {why}; leave it out."
    return ApiError(400, message, param=param, code="unsupported_parameter")


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


def _not_empty(ids: list[int], param: str) -> list[int]:
    if not ids:
        raise ApiError(400, "The prompt is empty.", param=param, code="invalid_value")
    return ids
