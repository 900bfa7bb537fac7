"""Whatever a stranger makes of our OpenAPI document, the answers are those that it promises."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from handler.openai.openapi import document
from tests.handler.conftest import Server

# Not among them: that every request which fits the schema is accepted. Whether a prompt fits into the
# context, or a token into the vocabulary, is the model's affair and in no schema.
CHECKS: list[Any] = [
    *(not_a_server_error, status_code_conformance, content_type_conformance),
    *(response_schema_conformance, negative_data_rejection, unsupported_method),
]


schema = schemathesis.openapi.from_dict(document())


@schema.parametrize()
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_promised(case: Any, shared_server: Server) -> None:
    case.call_and_validate(base_url=shared_server.url, checks=CHECKS)
