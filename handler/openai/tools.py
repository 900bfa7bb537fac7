"""The tools that a request offers: what may be asked, and how the model is told about them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from handler.openai.errors import ApiError
from handler.openai.messages import FunctionName
from handler.openai.reply.call_grammar import Signature
from handler.openai.reply.formats import CallFormat
from handler.openai.strict import Strict
from handler.openai.structured import check_size

MAX_TOOLS = 128
# What the model is told of a function.
_TOLD = {"name", "description", "parameters"}


class Function(Strict):
    """What a function is called, what it is for, and the JSON schema of its arguments."""

    name: FunctionName
    description: Annotated[str, Field(max_length=32_768)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """One function that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The one function that must be called."""

    name: FunctionName


class NamedTool(Strict):
    """`tool_choice` for one tool."""

    type: Literal["function"]
    function: NamedFunction


Mode = Literal["auto", "required"]


class AllowedNames(Strict):
    """Those of the tools that may be called now, and whether one must be."""

    mode: Mode
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(Strict):
    """`tool_choice` for some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedNames

    @property
    def names(self) -> list[str]:
        return [tool.function.name for tool in self.allowed_tools.tools]

    @property
    def mode(self) -> Mode:
        return self.allowed_tools.mode


Choice = Literal["none", "auto", "required"]
ToolChoice = Choice | Annotated[NamedTool | AllowedTools, Field(discriminator="type")]
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]


@dataclass(frozen=True)
class Offer:
    """The tools that the model is `told` of, as chat templates take them; none if it must not call any.

    `callable` are the functions that it may call; with `required` it must, and with `named` just once.
    """

    told: list[dict[str, Any]]
    callable: list[Signature]
    required: bool = False
    named: bool = False

    @property
    def held(self) -> bool:
        """Whether it takes a grammar to hold the model to this."""
        return self.required or any(function.strict for function in self.callable)


class SomeAllowed(Protocol):
    """A choice of some of the tools, by name."""

    @property
    def names(self) -> list[str]: ...
    @property
    def mode(self) -> Mode: ...


def offered(
    functions: Sequence[Function],
    choice: Choice | NamedFunction | SomeAllowed,
    place_of: str = "tools.{}.function",
) -> Offer:
    """What a request offers. `place_of` is how it names the place of a function.

    Where only some may be called, the model is told of no others.

    Raises `ApiError` 400 for tools and choices that contradict each other.
    """
    names = [function.name for function in functions]
    for place, function in enumerate(functions):
        _check(function, names[:place], place_of.format(place))
    chosen = [choice.name] if isinstance(choice, NamedFunction) else []
    if not isinstance(choice, str | NamedFunction):
        chosen = choice.names
        functions, choice = [function for function in functions if function.name in chosen], choice.mode
    if strange := [name for name in chosen if name not in names]:
        message = f"'tool_choice' names the function '{strange[0]}', which is not among 'tools'."
        raise ApiError(400, message, param="tool_choice", code="invalid_value")
    if choice == "required" and not functions:
        message = "'tool_choice' is 'required', but there are no 'tools' to call."
        raise ApiError(400, message, param="tool_choice", code="invalid_value")
    if choice == "none":
        return Offer([], [])
    named = choice.name if isinstance(choice, NamedFunction) else None
    return Offer(
        told=[
            {"type": "function", "function": function.model_dump(include=_TOLD, exclude_none=True)}
            for function in functions
        ],
        callable=[_signature(function) for function in functions if named in (None, function.name)],
        required=choice != "auto",
        named=named is not None,
    )


def _signature(function: Function) -> Signature:
    """What may be called. Arguments are a JSON object, and nothing in it where there are no parameters."""
    nothing = {"properties": {}, "additionalProperties": False}
    parameters = nothing if function.parameters is None else function.parameters
    return Signature(function.name, {"type": "object", **parameters}, bool(function.strict))


def _check(function: Function, earlier: list[str], param: str) -> None:
    if function.name in earlier:
        message = f"'{param}.name' is '{function.name}', which another tool is called already."
        raise ApiError(400, message, param=f"{param}.name", code="invalid_value")
    check_size(function.parameters or {}, f"{param}.parameters")


def with_fitting_ids(turns: list[dict[str, Any]], call_format: CallFormat | None) -> list[dict[str, Any]]:
    """Turns for a template that knows tools: the ids of calls are such that it takes them."""
    if call_format is None:
        return turns
    fitting = []
    for turn in turns:
        if "tool_call_id" in turn:
            turn = turn | {"tool_call_id": call_format.fitting_id(turn["tool_call_id"])}
        if "tool_calls" in turn:
            calls = [call | {"id": call_format.fitting_id(call["id"])} for call in turn["tool_calls"]]
            turn = turn | {"tool_calls": calls}
        fitting.append(turn)
    return fitting


_INTRODUCTION = """\
You can call these functions:
{tools}
To call one, answer with nothing but JSON of this form:
{{"name": "the function's name", "arguments": {{"its parameter": "value"}}}}
To call several, answer with a JSON list of them. When no function helps, answer in words as usual."""


def in_plain_text(
    turns: list[dict[str, Any]], tools: Sequence[dict[str, Any]], *, as_system: bool
) -> list[dict[str, Any]]:
    """Turns for a template that knows no tools: it gets them, calls and results as ordinary text.

    What there is to call stands in a system turn or, for templates that refuse those, in the first turn.
    """
    plain: list[dict[str, Any]] = []
    for turn in turns:
        shown = _as_plain(turn)
        # Many templates insist that user and assistant take turns, so results and questions are joined.
        if plain and shown["role"] == plain[-1]["role"] == "user":
            earlier = plain.pop()
            shown = earlier | {"content": f"{earlier['content']}\n\n{shown['content']}"}
        plain.append(shown)
    if not tools:
        return plain
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = _INTRODUCTION.format(tools=lines)
    if as_system and plain[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": text}, *plain]
    first = plain[0]
    parts = (first["content"], text) if first["role"] in ("system", "developer") else (text, first["content"])
    return [first | {"content": "\n\n".join(filter(None, parts))}, *plain[1:]]


def _as_plain(turn: dict[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in turn.items() if key not in ("tool_calls", "tool_call_id")}
    if turn["role"] == "tool":
        return plain | {"role": "user", "content": f"The function answered:\n{turn['content']}"}
    if "tool_calls" in turn:
        calls = [call["function"] for call in turn["tool_calls"]]
        shown = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
        return plain | {"content": "\n".join(filter(None, (turn["content"], shown)))}
    return plain
