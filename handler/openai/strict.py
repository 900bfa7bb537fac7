"""How request bodies are checked: nothing beyond the named fields, and mistakes told by their place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from handler.openai.errors import ApiError
from handler.openai.fields import settle

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class Strict(BaseModel):
    """No field beyond the named ones, no value turned into another type."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        # Built when the first request is read: until then there are health checks to answer.
        defer_build=True,
    )


def _must_be_off(value: bool) -> bool:
    if value:
        raise ValueError("this server can only do without")
    return value


# A switch for something that is not done. (`Literal[False]` would let 0 pass.)
Off = Annotated[bool, AfterValidator(_must_be_off), WithJsonSchema({"type": "boolean", "const": False})]
# A number of tokens.
NumTokens = Annotated[int, Field(ge=1, lt=1 << 31)]

T = TypeVar("T", bound=Strict)
# Complaints that say what would do, where several are about the same place.
_TELLING = {"literal_error": 1, "union_tag_invalid": 2}
# Each attempt finds the unknown nulls of one kind of place in a body; no library knows so many fields.
_MOST_ATTEMPTS, _MOST_NULLS = 12, 256


def parse(model: type[T], body: Any) -> T:
    """`body`, decoded JSON, as the request `model`. Raises `ApiError` 400 naming the field at fault."""
    if not isinstance(body, dict):
        raise ApiError(400, "The request body must be a JSON object.", code="invalid_type")
    kept = settle(body, frozenset(model.model_fields))
    attempts = 0
    while True:
        try:
            return model.model_validate(kept)
        except ValidationError as error:
            attempts += 1
            if attempts > _MOST_ATTEMPTS or not _drop_nulls(error, kept):
                raise _as_api_error(error, kept) from None


def _drop_nulls(error: ValidationError, body: dict[str, Any]) -> bool:
    """Drop the unknown fields that are null, from whatever is in one list; False if there are none.

    Clients put into a conversation what their libraries made of answers, with a null for every field that
    the library knows: it asks for nothing.
    """
    if error.error_count() > _MOST_NULLS:
        return False
    complaints = error.errors(include_url=False)
    nulls = [one for one in complaints if one["type"] == "extra_forbidden" and one["input"] is None]
    for complaint in nulls:
        *path, name = _path(complaint["loc"], body)
        holders: list[Any] = [body]
        for step in path:
            holders = [item for holder in holders for item in _within(holder, step)]
        for holder in holders:
            if isinstance(holder, dict) and holder.get(name, 0) is None:
                del holder[name]
    return bool(nulls)


def _within(holder: Any, step: str) -> list[Any]:
    """What is at a step of a path: for a list all that is in it."""
    if isinstance(holder, list):
        return holder
    return [holder[step]] if isinstance(holder, dict) and step in holder else []


def _as_api_error(error: ValidationError, body: dict[str, Any]) -> ApiError:
    complaint = max(error.errors(include_url=False), key=_closeness)
    path = _path(complaint["loc"], body)
    if complaint["type"] == "missing":
        return _missing([*path, str(complaint["loc"][-1])])
    if complaint["type"] in ("union_tag_invalid", "union_tag_not_found"):
        # The field's name in quotes, or a function's that finds it: `type_of()`.
        path.append(complaint["ctx"]["discriminator"].strip("'").removesuffix("_of()"))
        if complaint["type"] == "union_tag_not_found":
            return _missing(path)
        complaint["msg"] = f"it must be one of {complaint['ctx']['expected_tags']}"
    param = ".".join(path)
    if complaint["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown field '{param}'.", param=param, code="unknown_parameter")
    message = complaint["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return ApiError(400, f"'{param}' is not valid: {message}.", param=param, code="invalid_value")


def _closeness(complaint: ErrorDetails) -> tuple[bool, int, int, int]:
    """How likely it is that a complaint, of several about a union, speaks of the member that was meant.

    A member of another type was not meant. Among the others the one that got furthest was; and what is
    missing from a thing of the wrong kind does not matter.
    """
    location = complaint["loc"]
    place = location[-1] if location and isinstance(location[-1], int) else 0
    other_type = complaint["type"].endswith("_type")
    return not other_type, len(location), _TELLING.get(complaint["type"], 0), place


def _missing(path: list[str]) -> ApiError:
    param = ".".join(path)
    return ApiError(400, f"'{param}' is missing.", param=param, code="missing_required_parameter")


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
