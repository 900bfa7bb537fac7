"""How the Python API's callers say what they want: checked here, by name and range."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from runtime.errors import RequestError
from runtime.text import grammar

TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
StopText = Annotated[str, Meta(min_length=1)]


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The form that answers must have: just one of a JSON schema, a regular expression, a choice of texts, a
    grammar in Lark or GBNF, or any JSON object."""

    json: dict[str, Any] | None = None
    regex: StopText | None = None
    choice: Annotated[list[StopText], Meta(min_length=1)] | None = None
    grammar: StopText | None = None
    json_object: bool = False

    def source(self) -> str:
        """The form as the engine takes it. Raises `RequestError` unless there is just one."""
        parts = []
        if self.json is not None:
            parts.append(grammar.json_schema(self.json))
        if self.regex is not None:
            parts.append(grammar.regex(self.regex))
        if self.choice is not None:
            parts.append(grammar.choice(self.choice))
        if self.grammar is not None:
            parts.append(grammar.grammar(self.grammar))
        if self.json_object:
            parts.append(grammar.any_object())
        if len(parts) != 1:
            message = "structured_outputs needs just one of json, regex, choice, grammar and json_object."
            raise RequestError(message, "structured_outputs")
        return grammar.source(parts[0])


class SamplingOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How answers are sampled. None: the model's own default, then OpenAI's.

    `temperature` 0 is greedy. `stop` strings and `stop_token_ids` end an answer; `ignore_eos` lets it go
    on past the model's own end. With a `seed` a prompt gets the same answer whatever else is computed.
    `logprobs` None is off, 0 is the chosen tokens only, n adds the n most likely. `structured_outputs` holds
    answers to a form: see `StructuredOutputs`. None of `bad_words` comes, and with `allowed_token_ids`
    nothing but those. `truncate_prompt_tokens` takes the last so many tokens of each prompt, -1 as many as
    fit.
    """

    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]] = {}
    seed: Annotated[int, Meta(ge=0, lt=1 << 59)] | None = None
    stop: StopText | list[StopText] = []
    stop_token_ids: list[TokenId] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    structured_outputs: StructuredOutputs | None = None
    bad_words: list[Annotated[str, Meta(min_length=1)]] = []
    allowed_token_ids: list[TokenId] = []
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None

    @classmethod
    def of(cls, given: dict[str, Any]) -> SamplingOptions:
        """Keyword arguments as options. Raises `RequestError`, which names the one that makes no sense."""
        try:
            return msgspec.convert(given, cls)
        except msgspec.ValidationError as error:
            raise RequestError(f"sampling options: {str(error).replace('$.', '')}") from None

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def biases(self) -> dict[int, float]:
        """What is added to the logits of single tokens."""
        return self.logit_bias
