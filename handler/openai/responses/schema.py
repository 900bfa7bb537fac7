"""The request of POST /v1/responses: what is acted on. `handler.openai.fields` knows other fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from handler.openai.messages import MAX_MESSAGES, FunctionName
from handler.openai.schema import MAX_LOGPROBS, ReasoningEffort, Stops
from handler.openai.strict import NumTokens, Off, Strict
from handler.openai.structured import AnyObject, NamedSchema, PlainText
from handler.openai.tools import MAX_TOOLS, Choice, Function, Mode

Id = Annotated[str, Field(min_length=1, max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]
Empty = Annotated[list[Any], Field(max_length=0)]


class InputText(Strict):
    """A piece of what is put in."""

    type: Literal["input_text", "text"]
    text: str


class OutputText(Strict):
    """A piece of what an earlier response put out.

    Its log-probabilities are not looked at again, nor what the client's own helpers read in it.
    """

    type: Literal["output_text"]
    text: str
    annotations: Empty = []
    logprobs: list[Any] | None = None
    parsed: Any = None


class Refusal(Strict):
    """An earlier refusal."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


Part = Annotated[InputText | OutputText | Refusal, Field(discriminator="type")]


class InputMessage(Strict):
    """A turn."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True)]
    # What an earlier response's messages carry along.
    id: Id | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCall(Strict):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: Id
    name: FunctionName
    arguments: str
    parsed_arguments: Any = None
    id: Id | None = None
    status: Status | None = None


class FunctionCallOutput(Strict):
    """What came of it."""

    type: Literal["function_call_output"]
    call_id: Id
    output: str | Annotated[list[InputText], Field(fail_fast=True)]
    id: Id | None = None
    status: Status | None = None


class ReasoningText(Strict):
    """A piece of reasoning."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Strict):
    """Earlier reasoning; what the chat template makes of it is up to the model."""

    type: Literal["reasoning"]
    summary: list[ReasoningText] = []
    content: list[ReasoningText] | None = None
    encrypted_content: None = None
    id: Id | None = None
    status: Status | None = None


class ItemReference(Strict):
    """An item of an earlier response by its id alone: refused, as nothing is kept."""

    type: Literal["item_reference"]
    id: Id


def type_of(item: Any) -> Any:
    """What tells items apart: their type, which only messages may leave out."""
    return item.get("type", "message") if isinstance(item, dict) else None


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(type_of),
]
Items = Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class FunctionTool(Function):
    """A function that may be called, spelled without the wrapping that chats have."""

    type: Literal["function"]


class NamedFunctionTool(Strict):
    """The one function that must be called."""

    type: Literal["function"]
    name: FunctionName


class AllowedFunctionTools(Strict):
    """Those of the functions that may be called now, and whether one must be."""

    type: Literal["allowed_tools"]
    mode: Mode
    tools: Annotated[list[NamedFunctionTool], Field(min_length=1, max_length=MAX_TOOLS)]

    @property
    def names(self) -> list[str]:
        return [tool.name for tool in self.tools]


class ReasoningOptions(Strict):
    """How much to reason. Summaries are not made: the reasoning itself is handed out."""

    effort: ReasoningEffort | None = None
    summary: Literal["auto"] | None = None
    generate_summary: None = None


class SchemaFormat(NamedSchema):
    """JSON that fits a schema, spelled without the wrapping that chats have."""

    type: Literal["json_schema"]


TextFormat = Annotated[PlainText | AnyObject | SchemaFormat, Field(discriminator="type")]


class TextOptions(Strict):
    """How the text is written."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class StreamOptions(Strict):
    """Padding against traffic analysis: not done, so it may only be switched off."""

    include_obfuscation: Off = False


# Reasoning is handed out, and taken back, in the plain: there is none that would have to be encrypted.
Include = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]


class ResponsesRequest(Strict):
    """POST /v1/responses."""

    model: str | None = None
    input: str | Items
    instructions: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_output_tokens: NumTokens | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=1 << 31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Stops = []
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    include: list[Include] = []
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] = []
    tool_choice: Choice | Annotated[NamedFunctionTool | AllowedFunctionTools, Field(discriminator="type")] = (
        "auto"
    )
    parallel_tool_calls: bool = True
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] = {}
    metadata: Annotated[dict[str, str], Field(max_length=16)] = {}
    # OpenAI's default, which clients send along. Nothing is kept either way, and the answer says so.
    store: bool = True
