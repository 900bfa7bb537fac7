"""What is told of requests when they are over: counters, the access log, traces. Never what they say."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from prometheus_client.parser import text_string_to_metric_families

from handler.tracing import TracingError
from tests.handler.conftest import GREETING, MODEL, Server
from tests.handler.serving import until

Make = Callable[..., Server]
SECRET = "xyzzy"
GENERATED = len(GREETING) + 1


def figures(server: Server) -> dict[tuple[str, ...], float]:
    """The samples at /metrics by name and the values of their labels, sorted by the labels' names."""
    families = text_string_to_metric_families(server.get("/metrics").body.decode())
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


class TestMetrics:
    @pytest.fixture
    def found(self, make_server: Make) -> dict[tuple[str, ...], float]:
        server = make_server()
        assert server.chat().status == 200
        assert server.chat(stream=True, max_tokens=4, n=2).status == 200
        assert server.chat(temperature=9).status == 400
        return figures(server)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("request_params_n_count", 2),
            ("request_params_n_sum", 3),
            ("time_to_first_token_seconds_count", 2),
            ("e2e_request_latency_seconds_count", 2),
            ("request_queue_time_seconds_count", 2),
            ("request_prefill_time_seconds_count", 2),
            ("request_decode_time_seconds_count", 3),
            ("request_time_per_output_token_seconds_count", 3),
            ("request_prompt_tokens_count", 2),
            ("request_generation_tokens_sum", GENERATED + 8),
            ("generation_tokens_total", GENERATED + 8),
            ("num_requests_running", 0),
            ("num_requests_waiting", 0),
            ("kv_cache_usage_perc", 0),
            ("num_preemptions_total", 0),
            ("prefix_cache_queries_total", 0),
            ("prefix_cache_hits_total", 0),
        ],
    )
    def test_what_dashboards_for_vllm_show(
        self, found: dict[tuple[str, ...], float], name: str, value: float
    ) -> None:
        assert found[f"vllm:{name}", "0", MODEL] == value

    def test_ends_by_reason(self, found: dict[tuple[str, ...], float]) -> None:
        assert found["vllm:request_success_total", "0", "stop", MODEL] == 1
        assert found["vllm:request_success_total", "0", "length", MODEL] == 2

    def test_what_is_our_own(self, found: dict[tuple[str, ...], float]) -> None:
        route = "/v1/chat/completions"
        assert found["firstlight_http_responses_total", route, "200"] == 2
        assert found["firstlight_http_responses_total", route, "400"] == 1
        assert found["firstlight_state", "warm"] == 1
        assert found["firstlight_start_mark_seconds", "listen"] == 0.1
        assert found["firstlight_start_bytes_read",] == 1234

    def test_whoever_waits_for_the_model_is_seen_waiting(self, make_server: Make) -> None:
        server = make_server(prepare=lambda engine: engine.set_loading())
        with server.open_stream(n=3):
            assert server.engine.submit_seen.wait(10)
            assert figures(server)["vllm:num_requests_waiting", "0", MODEL] == 3
        assert figures(server)["firstlight_state", "loading"] == 1


class TestAccessLog:
    def lines(self, capfd: pytest.CaptureFixture[str], count: int) -> list[dict[str, Any]]:
        """The first lines; each is written when its answer is out already."""
        written = ""

        def complete() -> list[dict[str, Any]] | None:
            nonlocal written
            written += capfd.readouterr().err
            found = [json.loads(line) for line in written.splitlines(True) if line.endswith("}\n")]
            requests = [line for line in found if line["event"] == "request"]
            return requests if len(requests) >= count else None

        requests: list[dict[str, Any]] = until(complete)
        assert SECRET not in written
        return requests

    def test_a_generation(self, make_server: Make, capfd: pytest.CaptureFixture[str]) -> None:
        server = make_server(access_log=True)
        answer = server.post(
            "/v1/chat/completions?key=xyzzy",
            {"messages": [{"role": "user", "content": SECRET}]},
            {"X-Request-Id": "mine"},
        ).json
        (line,) = self.lines(capfd, 1)
        assert line["request_id"] == "mine"
        assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/chat/completions", 200)
        assert (line["id"], line["model"], line["stream"], line["choices"]) == (answer["id"], MODEL, False, 1)
        assert line["prompt_tokens"] == answer["usage"]["prompt_tokens"]
        assert (line["cached_tokens"], line["completion_tokens"]) == (16, GENERATED)
        assert line["finish_reasons"] == ["stop"]
        assert 0 <= line["queue_seconds"] <= line["ttft_seconds"] <= line["seconds"] < 30
        assert line["client"] == "127.0.0.1"

    def test_mistakes_and_everything_else(self, make_server: Make, capfd: pytest.CaptureFixture[str]) -> None:
        server = make_server(access_log=True, api_keys=("k",))
        key = {"Authorization": "Bearer k"}
        server.post("/v1/completions", {"prompt": SECRET, "n": 0}, key)
        server.get("/v1/models")
        server.get("/nowhere", key)
        server.post("/tokenize", {"prompt": SECRET}, key)
        for path in ("/health/live", "/metrics", "/"):
            server.get(path, key)
        lines = self.lines(capfd, 4)
        assert [line["status"] for line in lines] == [400, 401, 404, 200]
        assert lines[0]["error"] == "invalid_value"

    def test_whoever_left(self, make_server: Make, capfd: pytest.CaptureFixture[str]) -> None:
        server = make_server(access_log=True, prepare=lambda engine: engine.set_loading())
        with server.open_stream(stream=False):
            assert server.engine.submit_seen.wait(10)
        (left,) = self.lines(capfd, 1)
        assert (left["status"], left["error"], left["ttft_seconds"]) == (499, "client_gone", None)

    def test_it_can_be_switched_off(self, make_server: Make, capfd: pytest.CaptureFixture[str]) -> None:
        assert make_server(access_log=False).chat().status == 200
        assert make_server(access_log=True).chat(n=2).status == 200
        assert [line["choices"] for line in self.lines(capfd, 1)] == [2]


@contextmanager
def collector() -> Iterator[tuple[str, list[Span]]]:
    """A collector of traces, and the spans that it gets."""
    spans: list[Span] = []

    class Collect(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            """Nothing is logged."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collect)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class TestTraces:
    def test_a_span_for_each_generation(self, tiny_model: Any, make_server: Make) -> None:
        from tests.handler.conftest import starter

        trace = "0af7651916cd43dd8448eb211c80319c"
        with collector() as (endpoint, spans):
            with starter(tiny_model) as make:
                server = make(otlp_traces_endpoint=endpoint)
                body = {"messages": [{"role": "user", "content": SECRET}], "temperature": 0.5, "top_k": 7}
                parent = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
                answer = server.post("/v1/chat/completions", body, parent).json
                server.complete(SECRET, temperature=9)
                server.get("/v1/models")
            # The end of the server has sent what there was.
            chat, refused = spans
        assert chat.name == f"chat {MODEL}"
        assert (chat.trace_id.hex(), chat.parent_span_id.hex()) == (trace, "b7ad6b7169203331")
        assert chat.kind == Span.SPAN_KIND_SERVER
        assert chat.end_time_unix_nano >= chat.start_time_unix_nano
        told = {item.key: item.value for item in chat.attributes}
        assert told["gen_ai.operation.name"].string_value == "chat"
        assert told["gen_ai.response.id"].string_value == answer["id"]
        assert told["gen_ai.request.temperature"].double_value == 0.5
        assert told["gen_ai.request.top_k"].int_value == 7
        assert told["gen_ai.usage.input_tokens"].int_value == answer["usage"]["prompt_tokens"]
        assert told["gen_ai.usage.output_tokens"].int_value == GENERATED
        assert [v.string_value for v in told["gen_ai.response.finish_reasons"].array_value.values] == ["stop"]
        assert told["gen_ai.latency.time_to_first_token"].double_value > 0
        assert refused.name == "text_completion"
        assert refused.status.code == Status.STATUS_CODE_ERROR
        assert {item.key: item.value.string_value for item in refused.attributes}[
            "error.type"
        ] == "invalid_value"
        assert SECRET not in str(chat) + str(refused)

    def test_without_the_library_the_extra_is_named(
        self, make_server: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("handler.tracing.find_spec", lambda name: None)
        with pytest.raises(TracingError, match=r"firstlight\[otel\]"):
            make_server(otlp_traces_endpoint="http://127.0.0.1:1/v1/traces")
