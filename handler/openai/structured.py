"""Structured outputs: what OpenAI's and vLLM's requests say about the form of an answer's content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import msgspec
from pydantic import Field

from handler.limits import check_depth
from handler.openai.errors import ApiError
from handler.openai.strict import Strict
from handler.textroom import off_loop
from runtime.errors import RequestError
from runtime.text import grammar
from runtime.text.grammar import Part

# More than this nobody writes by hand; and all that one grammar is made of.
MAX_SCHEMA_BYTES = 65_536
MAX_GRAMMAR_BYTES = 262_144

Text = Annotated[str, Field(min_length=1)]
Choices = Annotated[list[Text], Field(min_length=1, max_length=4096, fail_fast=True)]
Schema = dict[str, Any] | str


class PlainText(Strict):
    """Any text."""

    type: Literal["text"]


class AnyObject(Strict):
    """A JSON object of any kind."""

    type: Literal["json_object"]


class NamedSchema(Strict):
    """A JSON schema. It is always kept to, `strict` or not."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchema(Strict):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[PlainText | AnyObject | JsonSchema, Field(discriminator="type")]


class StructuredOutputs(Strict):
    """vLLM's way to say it: one of these."""

    json_: Schema | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: bool | None = None


class Guided(Protocol):
    """The fields of requests for completions that this is about."""

    @property
    def response_format(self) -> PlainText | AnyObject | JsonSchema | None: ...
    @property
    def structured_outputs(self) -> StructuredOutputs | None: ...
    @property
    def guided_json(self) -> Schema | None: ...
    @property
    def guided_regex(self) -> Text | None: ...
    @property
    def guided_choice(self) -> Choices | None: ...
    @property
    def guided_grammar(self) -> Text | None: ...


@dataclass(frozen=True)
class Form:
    """The form that a request wants its content to have; `field` is what says so."""

    field: str
    size: int
    build: Callable[[], Part]

    async def part(self) -> Part:
        """The form as a grammar. Raises `ApiError` 400 for one that cannot be read."""
        try:
            return await off_loop(self.size, self.build)
        except RequestError as error:
            message = f"'{self.field}' is not valid: {error}"
            raise ApiError(400, message, param=self.field, code="invalid_value") from None


def asked_form(request: Guided) -> Form | None:
    """The form that a request's content must have. Raises `ApiError` 400 for several, or one too large."""
    forms: list[Form] = []
    wanted = request.response_format
    if isinstance(wanted, JsonSchema):
        forms += filter(None, [format_form(wanted.json_schema, "response_format.json_schema")])
    elif wanted is not None:
        forms += filter(None, [format_form(wanted, "response_format")])
    nested = request.structured_outputs
    if nested is not None:
        forms += _forms("structured_outputs.", nested.json_, nested.regex, nested.choice, nested.grammar)
        if nested.json_object:
            forms.append(Form("structured_outputs.json_object", 0, grammar.any_object))
        if not forms:
            message = (
                "'structured_outputs' must have one of 'json', 'regex', 'choice', 'grammar', 'json_object'."
            )
            raise ApiError(400, message, param="structured_outputs", code="invalid_value")
    forms += _forms(
        "guided_", request.guided_json, request.guided_regex, request.guided_choice, request.guided_grammar
    )
    if len(forms) > 1:
        message = f"'{forms[0].field}' and '{forms[1].field}' both say what the answer must look like."
        raise ApiError(400, message, param=forms[1].field, code="invalid_value")
    return forms[0] if forms else None


def format_form(wanted: PlainText | AnyObject | NamedSchema, field: str) -> Form | None:
    """The form that a format asks for, if any; `field` is what the request calls it."""
    if isinstance(wanted, AnyObject):
        return Form(field, 0, grammar.any_object)
    if isinstance(wanted, NamedSchema):
        return schema_form(wanted.schema_, f"{field}.schema")
    return None


def schema_form(schema: Schema, field: str) -> Form:
    """JSON that fits a schema, given as such or as JSON text. Raises `ApiError` 400 if it cannot be one."""
    if isinstance(schema, str):
        schema = _read(schema, field)
    size = check_size(schema, field)
    return Form(field, size, lambda: grammar.json_schema(schema))


def check_size(value: Any, field: str) -> int:
    """The size of a JSON value in bytes. Raises `ApiError` 400 if it is too large for a part of a grammar."""
    size = len(msgspec.json.encode(value))
    if size > MAX_SCHEMA_BYTES:
        message = f"'{field}' takes {size} bytes; {MAX_SCHEMA_BYTES} is the most."
        raise ApiError(400, message, param=field, code="invalid_value")
    return size


def _read(text: str, field: str) -> dict[str, Any]:
    try:
        schema = msgspec.json.decode(text)
        check_depth(schema)
    except (msgspec.MsgspecError, RecursionError, ApiError):
        schema = None
    if not isinstance(schema, dict):
        message = f"'{field}' is not a JSON schema: it must be a JSON object, or the text of one."
        raise ApiError(400, message, param=field, code="invalid_value")
    return schema


def _forms(
    prefix: str, schema: Schema | None, regex: str | None, choices: list[str] | None, rules: str | None
) -> list[Form]:
    forms = []
    if schema is not None:
        forms.append(schema_form(schema, f"{prefix}json"))
    if regex is not None:
        size = check_size(regex, f"{prefix}regex")
        forms.append(Form(f"{prefix}regex", size, lambda: grammar.regex(regex)))
    if choices is not None:
        size = check_size(choices, f"{prefix}choice")
        forms.append(Form(f"{prefix}choice", size, lambda: grammar.choice(choices)))
    if rules is not None:
        check_size(rules, f"{prefix}grammar")
        # Reading it takes llguidance, which is imported for the first one: never on the event loop.
        forms.append(Form(f"{prefix}grammar", MAX_SCHEMA_BYTES, lambda: grammar.grammar(rules)))
    return forms
