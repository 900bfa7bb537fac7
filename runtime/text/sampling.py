"""What a request asks for and what the model has by default -> what the engine samples with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from runtime.errors import RequestError
from runtime.protocol import MAX_BIASES, MAX_STOPS, Grammar, SamplingParams
from runtime.text.bans import NOTHING, Bans

if TYPE_CHECKING:
    from runtime.text.model_text import ModelText

# What a model's own defaults (generation_config.json, models.yaml) may set.
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


class ContextLengthError(RequestError):
    """Prompt and answer together would be longer than the model's context."""


class Asked(Protocol):
    """What a request says about sampling. None: the model's own default, else OpenAI's."""

    @property
    def temperature(self) -> float | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def min_p(self) -> float | None: ...
    @property
    def min_tokens(self) -> int | None: ...
    @property
    def repetition_penalty(self) -> float | None: ...
    @property
    def presence_penalty(self) -> float | None: ...
    @property
    def frequency_penalty(self) -> float | None: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def biases(self) -> dict[int, float]: ...
    @property
    def stop_token_ids(self) -> list[int]: ...
    @property
    def ignore_eos(self) -> bool: ...
    @property
    def allowed_token_ids(self) -> list[int]: ...


def sampling_params(
    asked: Asked,
    text: ModelText,
    *,
    max_tokens: int,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    banned: Bans = NOTHING,
    grammar: Grammar | None = None,
) -> SamplingParams:
    """Settle every value: the request's, else the model's own default, else OpenAI's.

    What is `banned` never comes, and only what the `grammar` allows.

    Raises `RequestError` for token ids outside the vocabulary, for more of them than there is room for, and
    for bounds that contradict each other.
    """
    settled: dict[str, Any] = {name: text.defaults[name] for name in DEFAULTED if name in text.defaults}
    settled |= {name: value for name in DEFAULTED if (value := getattr(asked, name)) is not None}
    settled["top_k"] = max(0, settled.get("top_k", 0))
    # OpenAI takes a top_p of 0 and means "only the most likely token", which any tiny share also says.
    settled["top_p"] = max(settled.get("top_p", 1.0), 1e-6)
    if settled.get("min_tokens", 0) > max_tokens:
        if asked.min_tokens is not None:
            message = f"'min_tokens' ({asked.min_tokens}) is larger than the {max_tokens} tokens allowed."
            raise RequestError(message, "min_tokens")
        settled["min_tokens"] = max_tokens
    check_ids(asked.biases, text.vocab_size, "logit_bias")
    check_ids(asked.stop_token_ids, text.vocab_size, "stop_token_ids")
    check_ids(asked.allowed_token_ids, text.vocab_size, "allowed_token_ids")
    stops = (*asked.stop_token_ids, *(() if asked.ignore_eos else text.eos_token_ids))
    biases = {**asked.biases, **dict.fromkeys(banned.tokens, -math.inf)}
    _check_number(len(biases), MAX_BIASES, "'logit_bias' and 'bad_words' name", "logit_bias")
    if settled.get("min_tokens"):
        _check_number(len(stops), MAX_STOPS, "with 'min_tokens', 'stop_token_ids' has", "stop_token_ids")
    if asked.allowed_token_ids and set(asked.allowed_token_ids) <= set(banned.tokens):
        message = "'bad_words' rule out every token that 'allowed_token_ids' allows."
        raise RequestError(message, "allowed_token_ids")
    return SamplingParams(
        max_tokens=max_tokens,
        logit_bias=biases,
        stop_token_ids=tuple(dict.fromkeys(stops)),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
        allowed_token_ids=tuple(dict.fromkeys(asked.allowed_token_ids)),
        bad_words=banned.sequences,
        **settled,
    )


def _check_number(number: int, most: int, what: str, param: str) -> None:
    if number > most:
        raise RequestError(f"{what} {number} tokens; {most} is the most.", param)


def check_ids(ids: Iterable[int], vocab_size: int, param: str) -> None:
    """Raise `RequestError` if a token id lies outside the vocabulary."""
    highest = max(ids, default=0)
    if highest >= vocab_size:
        message = f"'{param}' holds the token id {highest}; this model's ids end at {vocab_size - 1}."
        raise RequestError(message, param)


def answer_room(
    prompt_tokens: int,
    asked: int | None,
    max_model_len: int,
    prompt: str = "prompt",
    limit: str = "max_tokens",
) -> int:
    """How many tokens the answer may have: what was asked for, else what the context leaves.

    Raises `ContextLengthError` with the numbers if that does not fit. It blames the field named `prompt`
    where that alone fills the context, else the one named `limit`.
    """
    left = max_model_len - prompt_tokens
    wanted = 1 if asked is None else asked
    if wanted > left:
        message = (
            f"This model's maximum context length is {max_model_len} tokens. However, you requested "
            f"{prompt_tokens + wanted} tokens ({prompt_tokens} in the prompt, {wanted} in the answer). "
            "Shorten the prompt or ask for a shorter answer."
        )
        raise ContextLengthError(message, prompt if left < 1 else limit)
    return left if asked is None else asked


def truncated(prompt: list[int], asked: int | None, max_tokens: int | None, max_model_len: int) -> list[int]:
    """The last tokens of a prompt: as many as were asked for, all with None.

    With -1 it is as many as the context has room for beside an answer of `max_tokens`, or of one.

    Raises `RequestError` for more than the context has.
    """
    if asked is None:
        return prompt
    if asked > max_model_len:
        message = (
            f"'truncate_prompt_tokens' ({asked}) is larger than this model's maximum context length, "
            f"{max_model_len} tokens."
        )
        raise RequestError(message, "truncate_prompt_tokens")
    most = max(1, max_model_len - max(1, max_tokens or 1)) if asked < 0 else asked
    return prompt[-most:]
