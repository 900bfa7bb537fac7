"""A request's sampling fields -> what the engine samples with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handler.openai.errors import ApiError
from handler.openai.schema import Sampling
from runtime.protocol import SamplingParams

# Keys that a model's own defaults (generation_config.json, models.yaml) may set.
DEFAULTED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "min_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)


def sampling_params(
    request: Sampling,
    defaults: Mapping[str, Any],
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    eos_token_ids: tuple[int, ...],
    vocab_size: int,
) -> SamplingParams:
    """Settle every value: the request's, else the model's own default, else OpenAI's.

    Raises `ApiError` 400 for token ids outside the vocabulary and for bounds that contradict each other.
    """
    settled = {name: defaults[name] for name in DEFAULTED if name in defaults}
    settled |= {name: value for name in DEFAULTED if (value := getattr(request, name)) is not None}
    settled["top_k"] = max(0, settled.get("top_k", 0))
    # OpenAI takes a top_p of 0 and means "only the most likely token", which any tiny share also says.
    settled["top_p"] = max(settled.get("top_p", 1.0), 1e-6)
    if settled.get("min_tokens", 0) > max_tokens:
        if request.min_tokens is not None:
            message = f"'min_tokens' ({request.min_tokens}) is larger than the {max_tokens} tokens allowed."
            raise ApiError(400, message, param="min_tokens", code="invalid_value")
        settled["min_tokens"] = max_tokens
    check_ids(request.biases, vocab_size, "logit_bias")
    check_ids(request.stop_token_ids, vocab_size, "stop_token_ids")
    stops = (*request.stop_token_ids, *(() if request.ignore_eos else eos_token_ids))
    return SamplingParams(
        max_tokens=max_tokens,
        logit_bias=request.biases,
        stop_token_ids=tuple(dict.fromkeys(stops)),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        **settled,
    )


def check_ids(ids: Any, vocab_size: int, param: str) -> None:
    """Raise `ApiError` 400 if a token id lies outside the vocabulary."""
    highest = max(ids, default=0)
    if highest >= vocab_size:
        message = f"'{param}' holds the token id {highest}; this model's ids end at {vocab_size - 1}."
        raise ApiError(400, message, param=param, code="invalid_value")


def answer_room(prompt_tokens: int, asked: int | None, max_model_len: int, param: str) -> int:
    """How many tokens the answer may have: what was asked for, else what the context leaves.

    Raises `ApiError` 400 with the numbers if that does not fit.
    """
    left = max_model_len - prompt_tokens
    wanted = 1 if asked is None else asked
    if wanted > left:
        message = (
            f"This model's maximum context length is {max_model_len} tokens. However, you requested "
            f"{prompt_tokens + wanted} tokens ({prompt_tokens} in the prompt, {wanted} in the answer). "
            "Shorten the prompt or ask for a shorter answer."
        )
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    return left if asked is None else asked
