"""How the counters read at /metrics.

What means the same in vLLM's server has the name, and the labels, that it has there, so that dashboards
made for it show it; what only this server knows begins with `firstlight_`. `prometheus_client` is imported
when somebody first looks, and only writes the figures down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from runtime.client import State

if TYPE_CHECKING:
    from handler.metrics import Histogram
    from handler.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LABELS = ["model_name", "engine"]


def exposition(services: Sequence[Service]) -> bytes:
    """The figures of all models in Prometheus' text format."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(_Collector(services))
    return generate_latest(registry)


class _Collector:
    def __init__(self, services: Sequence[Service]) -> None:
        self._models = [_Model(service, is_alone=len(services) == 1) for service in services]

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        families: dict[str, Any] = {}
        for model in self._models:
            for family in model.collect():
                known = families.setdefault(family.name, family)
                if known is not family:
                    known.samples.extend(family.samples)
        yield from families.values()


class _Model:
    """The figures of one model. Where there are others, this server's own are told apart by its name."""

    def __init__(self, service: Service, is_alone: bool) -> None:
        self.service = service
        self.metrics = service.metrics
        self.client = service.client
        self._labels = [service.model, "0"]
        self._own: dict[str, str] = {} if is_alone else {"model_name": service.model}

    def collect(self) -> Iterator[Any]:
        yield from self._counts()
        yield from self._times()
        yield from self._lengths()
        yield from self._engine()
        yield from self._handler()
        yield from self._start()

    # ---- what vLLM has too ---------------------------------------------------------------------

    def _counts(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        metrics = self.metrics
        ended = CounterMetricFamily(
            "vllm:request_success", "Sequences that ended, by reason.", labels=[*_LABELS, "finished_reason"]
        )
        for reason in sorted({"stop", "length", *metrics.reasons}):
            ended.add_metric([*self._labels, reason], metrics.reasons[reason])
        yield ended
        yield self._counter("prompt_tokens", "Prompt tokens of requests.", metrics.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", metrics.generated_tokens)

    def _times(self) -> Iterator[Any]:
        metrics = self.metrics
        for name, text, histogram in (
            ("time_to_first_token", "From the request to its first token.", metrics.ttft),
            ("inter_token_latency", "From one piece of an answer to the next.", metrics.inter_token),
            ("time_per_output_token", "The same by its older name.", metrics.inter_token),
            ("request_time_per_output_token", "Time per token after the first, by sequence.", metrics.tpot),
            ("e2e_request_latency", "From the request to the end of its answer.", metrics.latency),
            ("request_queue_time", "Until the engine took the request up.", metrics.queue),
            ("request_prefill_time", "From there to the first token.", metrics.prefill),
            ("request_decode_time", "From the first token to the last, by sequence.", metrics.decode),
        ):
            yield self._histogram(f"{name}_seconds", text, histogram)

    def _lengths(self) -> Iterator[Any]:
        metrics = self.metrics
        for name, text, histogram in (
            ("request_prompt_tokens", "Prompts' lengths in tokens.", metrics.prompt_lengths),
            ("request_generation_tokens", "Answers' lengths in tokens.", metrics.answer_lengths),
            (
                "request_params_max_tokens",
                "The most tokens that an answer might have had.",
                metrics.max_tokens,
            ),
            ("request_params_n", "Sequences by request.", metrics.choices),
        ):
            yield self._histogram(name, text, histogram)

    def _engine(self) -> Iterator[Any]:
        stats = self.client.stats
        usage = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
        yield self._gauge("num_requests_running", "Sequences that the engine is working on.", stats.running)
        # While it loads or sleeps, the engine has not even heard of those that wait for it.
        waiting = max(stats.waiting, self.client.in_flight - stats.running)
        yield self._gauge("num_requests_waiting", "Sequences that wait to be worked on.", waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", usage)
        for name, text, total in (
            ("num_preemptions", "Sequences put back because the KV cache was full.", stats.preemptions_total),
            ("prefix_cache_queries", "Prompt tokens looked up in the cache.", stats.prompt_tokens_total),
            ("prefix_cache_hits", "Prompt tokens found in the cache.", stats.cached_tokens_total),
        ):
            yield self._counter(name, text, total)

    # ---- what is this server's own -------------------------------------------------------------

    def _handler(self) -> Iterator[Any]:
        responses = self._own_counter("http_responses", "Answers by route and status.", "route", "status")
        for (route, status), count in self.metrics.responses.items():
            responses.add_metric([*self._own.values(), route, status], count)
        yield responses
        text = "Sequences that wait for their first token."
        yield self._own_gauge("num_requests_queued", text, {(): self.service.admission.waiting})
        client = self.client
        for name, text, total in (
            ("client_disconnects", "Clients that left before their answer ended.", self.metrics.disconnects),
            ("engine_steps", "Steps since the engine started.", client.stats.steps_total),
            ("engine_restarts", "How often the engine was started again.", client.restarts),
            ("engine_sleeps", "How often the engine has fallen asleep.", client.sleeps),
            ("engine_wakes", "How often the engine has woken.", client.wakes),
        ):
            counter = self._own_counter(name, text)
            counter.add_metric([*self._own.values()], total)
            yield counter
        if client.wake_seconds is not None:
            text = "How long the engine took to wake, the last time."
            yield self._own_gauge("wake_seconds", text, {(): client.wake_seconds})

    def _start(self) -> Iterator[Any]:
        text = "1 for the state that the engine is in."
        states = {(name,): float(self.client.state == name) for name in get_args(State)}
        yield self._own_gauge("state", text, states, "state")
        text = "When the start reached each mark, from execution."
        marks = {(name,): seconds for name, seconds in self.client.marks.items()}
        yield self._own_gauge("start_mark_seconds", text, marks, "mark")
        if self.client.info is not None:
            for name, count in self.client.info.counters.items():
                yield self._own_gauge(f"start_{name}", "Counted during the start.", {(): count})

    # ---- families ------------------------------------------------------------------------------

    def _own_counter(self, name: str, text: str, *labels: str) -> Any:
        from prometheus_client.core import CounterMetricFamily

        return CounterMetricFamily(f"firstlight_{name}", text, labels=[*self._own, *labels])

    def _own_gauge(self, name: str, text: str, values: Mapping[Any, float], *labels: str) -> Any:
        """Values by tuples of what the `labels` say."""
        from prometheus_client.core import GaugeMetricFamily

        family = GaugeMetricFamily(f"firstlight_{name}", text, labels=[*self._own, *labels])
        for own, value in values.items():
            family.add_metric([*self._own.values(), *own], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Any:
        from prometheus_client.core import CounterMetricFamily

        family = CounterMetricFamily(f"vllm:{name}", text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Any:
        from prometheus_client.core import GaugeMetricFamily

        family = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Any:
        from prometheus_client.core import HistogramMetricFamily

        family = HistogramMetricFamily(f"vllm:{name}", text, labels=_LABELS)
        family.add_metric(self._labels, histogram.cumulative(), histogram.total)
        return family
