"""Errors as OpenAI's clients expect them: a status and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from runtime.client import EngineUnavailable
from runtime.errors import FirstlightError, RequestError
from runtime.text.sampling import ContextLengthError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(FirstlightError):
    """An answer other than success. `retry_after` (seconds) becomes the header of that name."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))

    def body(self) -> dict[str, Any]:
        """OpenAI's envelope."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def encoded(self) -> bytes:
        """The envelope as JSON."""
        return msgspec.json.encode(self.body())


def as_api_error(error: Exception) -> ApiError:
    """The answer for an error that a request ran into. What is not meant for people stays unsaid."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineUnavailable):
        return ApiError(503, str(error), code="engine_unavailable", retry_after=error.retry_after)
    if isinstance(error, RequestError):
        too_long = isinstance(error, ContextLengthError)
        code = "context_length_exceeded" if too_long else "invalid_value"
        return ApiError(400, str(error), param=error.param, code=code)
    if isinstance(error, FirstlightError):
        return ApiError(500, str(error), code="internal_error")
    return ApiError(500, "The server failed on this request; its log says more.", code="internal_error")
