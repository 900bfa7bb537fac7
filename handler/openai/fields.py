"""Fields of OpenAI's and vLLM's requests that this server does not act on, and when they may be there.

Nothing is accepted and then ignored: a field listed here passes only with a value that changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from handler.openai.errors import ApiError

Test = Callable[[Any], bool]


def _is(*values: Any) -> Test:
    # `is` for the booleans, because 1 == True.
    return lambda value: any(value is v or (type(value) is type(v) and value == v) for v in values)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _boolean(value: Any) -> bool:
    return isinstance(value, bool)


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _metadata(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


# OpenAI documents that none of these changes the output.
_WITHOUT_EFFECT: dict[str, Test] = {
    "user": _text,
    "metadata": _metadata,
    "store": _boolean,
    "safety_identifier": _text,
    "prompt_cache_key": _text,
    "prompt_cache_options": _object,
    "prompt_cache_retention": _text,
    "service_tier": _is("auto", "default"),
}

# What each of these asks for is not done here, so they pass only when they ask for nothing.
_LATER: dict[str, Test] = {
    "background": _is(False),
    "early_stopping": _is(False),
    "function_call": _is("none", "auto"),
    "functions": _is([]),
    "guided_decoding_backend": _is("auto", "guidance"),
    "length_penalty": _is(1, 1.0),
    "modalities": _is(["text"]),
    "spaces_between_special_tokens": _is(True),
    "suffix": _is(""),
    "truncation": _is("disabled"),
    "use_beam_search": _is(False),
    "verbosity": _is("medium"),
}

# These have no value other than null that asks for nothing.
_NEVER = {
    "access_programs",
    "audio",
    "background_options",
    "chat_template",
    "context_management",
    "conversation",
    "guided_whitespace_pattern",
    "kv_transfer_params",
    "logits_processors",
    "max_tool_calls",
    "mm_processor_kwargs",
    "moderation",
    "prediction",
    "previous_response_id",
    "prompt",
    "prompt_embeds",
    "thinking_token_budget",
    "vllm_xargs",
    "web_search_options",
}

KNOWN = _WITHOUT_EFFECT.keys() | _LATER.keys() | _NEVER


def settle(body: dict[str, Any], accepted: frozenset[str]) -> dict[str, Any]:
    """The fields of `body` that mean something here.

    `accepted` are the fields that the endpoint acts on. Null is the same as absent. Raises `ApiError` 400
    naming the first field that cannot be met.
    """
    kept = {}
    for name, value in body.items():
        if name in accepted:
            if value is not None:
                kept[name] = value
        elif name not in KNOWN:
            raise _unknown(name[:100], accepted)
        elif value is not None:
            _check(name, value)
    return kept


# What other programs call a field of ours, too differently to be found by its spelling.
_ELSEWHERE = {
    "enable_thinking": "chat_template_kwargs",
    "think": "chat_template_kwargs",
    "thinking": "chat_template_kwargs",
    "reasoning": "reasoning_effort",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "stop_sequences": "stop",
    "num_predict": "max_tokens",
    "n_predict": "max_tokens",
    "grammar": "structured_outputs",
    "json_schema": "response_format",
}


def _unknown(name: str, accepted: frozenset[str]) -> ApiError:
    import difflib

    meant = _ELSEWHERE.get(name) or next(iter(difflib.get_close_matches(name, accepted, 1, 0.75)), None)
    hint = f" Did you mean '{meant}'?" if meant in accepted else ""
    return ApiError(400, f"Unknown field '{name}'.{hint}", param=name, code="unknown_parameter")


def _check(name: str, value: Any) -> None:
    if name in _WITHOUT_EFFECT:
        if not _WITHOUT_EFFECT[name](value):
            raise ApiError(400, f"'{name}' has a value that is not valid.", param=name, code="invalid_value")
    elif name in _NEVER or not _LATER[name](value):
        raise ApiError(
            400,
            f"'{name}' is not supported by this server; leave it out.",
            param=name,
            code="unsupported_parameter",
        )
