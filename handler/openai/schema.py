"""The requests that this server answers. Only fields that it acts on are here; `fields` knows the others."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from handler.openai.messages import Messages
from handler.openai.strict import NumTokens, Off, Strict
from handler.openai.structured import Choices, ResponseFormat, Schema, StructuredOutputs, Text
from handler.openai.tools import ToolChoice, Tools

MAX_N = 128
MAX_LOGPROBS = 20
MAX_PROMPTS = 1024

BadWord = Annotated[str, Field(min_length=1, max_length=256)]
StopText = Annotated[str, Field(min_length=1, max_length=1024)]
# Editors send one for everything that may follow a line of code.
Stops = StopText | Annotated[list[StopText], Field(max_length=64)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
# One bad id is enough: a million complaints about a million bad ids would only cost memory.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
TemplateVariables = Annotated[dict[str, Any], Field(max_length=32)]
Documents = Annotated[list[dict[str, str]], Field(max_length=1024)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:/+=@-]{1,128}$")]
CacheSalt = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,256}$")]


class StreamOptions(Strict):
    """What a stream reports beside the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    # Padding against traffic analysis: not done, so it may only be switched off.
    include_obfuscation: Off = False


class Sampling(Strict):
    """What chat and text completions share. None: the model's own default, then OpenAI's."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: NumTokens | None = None
    min_tokens: int | None = Field(None, ge=0, lt=1 << 31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=1 << 31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=1024)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    n: int = Field(1, ge=1, le=MAX_N)
    stop: Stops = []
    stop_token_ids: list[TokenId] = Field([], max_length=128)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    cache_salt: CacheSalt | None = None
    priority: int = Field(0, ge=-(1 << 31), lt=1 << 31)
    request_id: RequestId | None = None
    bad_words: Annotated[list[BadWord], Field(max_length=128)] = []
    allowed_token_ids: Annotated[list[TokenId], Field(fail_fast=True)] = []
    truncate_prompt_tokens: int | None = Field(None, ge=-1, lt=1 << 31)
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float]) -> dict[str, float]:
        for key in value:
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError("keys must be token ids")
        return value

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _some_tokens(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("it must leave at least one token; -1 leaves as many as fit")
        return value

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def biases(self) -> dict[int, float]:
        """`logit_bias` by token id."""
        return {int(key): value for key, value in self.logit_bias.items()}


class ChatOptions(Sampling):
    """How a conversation is rendered and answered, whatever its turns are spelled like."""

    max_completion_tokens: NumTokens | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: TemplateVariables = {}
    documents: Documents = []
    reasoning_effort: ReasoningEffort | None = None
    include_reasoning: bool = True
    parallel_tool_calls: bool = True


class ChatRequest(ChatOptions):
    """POST /v1/chat/completions."""

    messages: Messages
    echo: Off = False
    best_of: int = Field(1, ge=1, le=1)
    tools: Tools = []
    tool_choice: ToolChoice = "auto"


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    max_tokens: int | None = Field(None, ge=0, lt=1 << 31)
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    best_of: int | None = Field(None, ge=1, le=MAX_N)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = True


class TokenizeRequest(Strict):
    """POST /tokenize: either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: TemplateVariables = {}
    tools: Tools = []
    return_token_strs: bool = False


class SleepRequest(Strict):
    """POST /sleep: at level 1 the weights wait in main memory, at level 2 in their files."""

    model: str | None = None
    level: Literal[1, 2] = 1


class WakeRequest(Strict):
    """POST /wake."""

    model: str | None = None


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
