"""Traces for OpenTelemetry: one span for each generation, with the attributes of the GenAI conventions.

See https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/; the latencies have the names that
vLLM gives them. What was asked and answered is in no span. The library is an optional extra and takes
long to import, so a thread of its own does that, and writes the spans.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from handler.record import Record
from runtime.errors import FirstlightError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_ASKED = (*("max_tokens", "temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "seed"),)


class TracingError(FirstlightError):
    """Traces are asked for and cannot be written."""


class Tracing:
    """Sends a span for each generation to `endpoint`, an OTLP/HTTP URL that ends in /v1/traces."""

    def __init__(self, endpoint: str) -> None:
        if find_spec("opentelemetry") is None or find_spec("opentelemetry.exporter") is None:
            raise TracingError(
                "--otlp-traces-endpoint needs OpenTelemetry: install it with `pip install 'firstlight[otel]'`"
            )
        self._endpoint = endpoint
        self._provider: TracerProvider | None = None
        self._thread = ThreadPoolExecutor(1, "traces")

    def observe(self, record: Record) -> None:
        """Write the span of a request, soon."""
        if record.operation is not None:
            self._thread.submit(self._write, record)

    def close(self) -> None:
        """Send what has not been sent yet."""
        self._thread.shutdown()
        if self._provider is not None:
            self._provider.shutdown()

    def _write(self, record: Record) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if self._provider is None:
            self._provider = _provider(self._endpoint)
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in record.headers}
        span = self._provider.get_tracer("firstlight").start_span(
            f"{record.operation} {record.model}" if record.model else str(record.operation),
            context=TraceContextTextMapPropagator().extract(carrier),
            kind=SpanKind.SERVER,
            attributes=attributes(record),
            start_time=record.began_ns,
        )
        if record.error is not None:
            span.set_status(Status(StatusCode.ERROR))
        span.end(record.began_ns + int(record.seconds * 1e9))


def _provider(endpoint: str) -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = Resource({SERVICE_NAME: "firstlight"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=named)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    return provider


def attributes(record: Record) -> dict[str, Any]:
    """What a span says of a generation; nothing stands for what is not known."""
    found: dict[str, Any] = {
        "gen_ai.operation.name": record.operation,
        "gen_ai.provider.name": "firstlight",
        "gen_ai.request.model": record.model,
        "gen_ai.request.choice.count": record.choices if record.choices > 1 else None,
        "gen_ai.response.id": record.id,
        "gen_ai.response.model": record.model,
        "gen_ai.response.finish_reasons": record.finish_reasons or None,
        "gen_ai.usage.input_tokens": record.prompt_tokens or None,
        "gen_ai.usage.output_tokens": record.completion_tokens or None,
        "gen_ai.latency.time_in_queue": record.queue,
        "gen_ai.latency.time_to_first_token": record.ttft,
        "gen_ai.latency.e2e": record.seconds,
        "firstlight.request_id": record.request_id,
        "http.request.method": record.method,
        "http.response.status_code": record.status,
        "url.path": record.path,
        "error.type": record.error,
    }
    found |= {f"gen_ai.request.{name}": record.asked.get(name) for name in _ASKED}
    return {name: value for name, value in found.items() if value is not None}
