"""The requests that this server answers. Only fields that it acts on are here; `fields` knows the others."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from handler.openai.errors import ApiError
from handler.openai.fields import settle

MAX_N = 128
MAX_LOGPROBS = 20
MAX_MESSAGES = 4096
MAX_PROMPTS = 1024

StopText = Annotated[str, Field(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
# One bad id is enough: a million complaints about a million bad ids would only cost memory.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
CacheSalt = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,256}$")]


class Strict(BaseModel):
    """No field beyond the named ones, no value turned into another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class TextPart(Strict):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None
    # What assistant turns carry when a client sends an answer back; only their empty values make sense here.
    refusal: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    reasoning_content: None = None

    @property
    def text(self) -> str:
        """The content in one piece."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class StreamOptions(Strict):
    """What a stream reports beside the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    # Padding against traffic analysis: not done, so it may only be switched off.
    include_obfuscation: Literal[False] = False


class Sampling(Strict):
    """What chat and text completions share. None: the model's own default, then OpenAI's."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=1024)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    n: int = Field(1, ge=1, le=MAX_N)
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] = []
    stop_token_ids: list[TokenId] = Field([], max_length=128)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    cache_salt: CacheSalt = ""

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float]) -> dict[str, float]:
        for key in value:
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError("keys must be token ids")
        return value

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def biases(self) -> dict[int, float]:
        """`logit_bias` by token id."""
        return {int(key): value for key, value in self.logit_bias.items()}


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: Literal[False] = False
    best_of: Literal[1] = 1
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    max_tokens: int | None = Field(None, ge=0)
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = True


class TokenizeRequest(Strict):
    """POST /tokenize: either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


T = TypeVar("T", bound=Strict)


def parse(model: type[T], body: Any) -> T:
    """`body`, decoded JSON, as the request `model`. Raises `ApiError` 400 naming the field at fault."""
    if not isinstance(body, dict):
        raise ApiError(400, "The request body must be a JSON object.", code="invalid_type")
    kept = settle(body, frozenset(model.model_fields))
    try:
        return model.model_validate(kept)
    except ValidationError as error:
        raise _as_api_error(error, kept) from None


def _as_api_error(error: ValidationError, body: dict[str, Any]) -> ApiError:
    # Of a union's complaints, the one that went deepest into the body speaks of what was meant.
    complaint = max(error.errors(include_url=False, include_context=False), key=lambda e: len(e["loc"]))
    path = _path(complaint["loc"], body)
    if complaint["type"] == "missing":
        param = ".".join([*path, str(complaint["loc"][-1])])
        return ApiError(400, f"'{param}' is missing.", param=param, code="missing_required_parameter")
    param = ".".join(path)
    if complaint["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown field '{param}'.", param=param, code="unknown_parameter")
    message = complaint["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return ApiError(400, f"'{param}' is not valid: {message}.", param=param, code="invalid_value")


def _path(location: tuple[int | str, ...], body: Any) -> list[str]:
    """The part of a complaint's location that lies in the body, without the names of union members."""
    path = []
    here = body
    for step in location:
        in_object = isinstance(here, dict) and step in here
        if in_object or (isinstance(here, list) and isinstance(step, int) and step < len(here)):
            path.append(str(step)[:100])
            here = here[step]
    return path
