"""What is counted about requests, and how it reads at /metrics.

Counting is plain arithmetic on the way of every token, so it is done by hand; `prometheus_client` is
imported when somebody first looks, and only writes the figures down.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.client import EngineClient

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_STATES = ("cold", "loading", "warm", "asleep", "waking", "draining", "failed")


class Histogram:
    """Counts of observations by bucket; `bounds` are the buckets' upper ends in seconds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Prometheus' buckets: for each upper end, how many observations lie at or below it."""
        buckets, running = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            running += count
            buckets.append((bound, float(running)))
        return buckets


class Metrics:
    """The handler's counters. Times are in seconds."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, str]] = Counter()
        self.finished: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.disconnects = 0
        self.ttft = Histogram(_SECONDS)
        self.tpot = Histogram(_PER_TOKEN)
        self.latency = Histogram(_SECONDS)

    def sequence_finished(self, reason: str, generated: int, decode_seconds: float) -> None:
        """One sequence has ended after so many tokens, `decode_seconds` after its first one."""
        self.finished[reason] += 1
        self.generated_tokens += generated
        if generated > 1:
            self.tpot.observe(decode_seconds / (generated - 1))

    def exposition(self, client: EngineClient, queued: int) -> bytes:
        """The figures in Prometheus' text format."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry()
        registry.register(_Collector(self, client, queued))
        return generate_latest(registry)


class _Collector:
    def __init__(self, metrics: Metrics, client: EngineClient, queued: int) -> None:
        self.metrics = metrics
        self.client = client
        self.queued = queued

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        yield from self._requests()
        yield from self._engine()
        yield from self._start()

    def _requests(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        metrics = self.metrics
        responses = CounterMetricFamily(
            "firstlight_http_responses", "Answers by route and status.", labels=["route", "status"]
        )
        for (route, status), count in metrics.responses.items():
            responses.add_metric([route, status], count)
        yield responses
        finished = CounterMetricFamily(
            "firstlight_request_success", "Sequences that ended, by reason.", labels=["finished_reason"]
        )
        for reason, count in metrics.finished.items():
            finished.add_metric([reason], count)
        yield finished
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens of answered requests.", metrics.prompt_tokens),
            ("generation_tokens", "Tokens of finished sequences.", metrics.generated_tokens),
            (
                "client_disconnects",
                "Clients that left before their answer was complete.",
                metrics.disconnects,
            ),
        ):
            yield CounterMetricFamily(f"firstlight_{name}", text, value=value)
        for name, text, histogram in (
            ("time_to_first_token", "From the request to its first token.", metrics.ttft),
            ("time_per_output_token", "Time per token after the first, by sequence.", metrics.tpot),
            ("e2e_request_latency", "From the request to the end of its answer.", metrics.latency),
        ):
            family = HistogramMetricFamily(f"firstlight_{name}_seconds", text)
            family.add_metric([], histogram.cumulative(), histogram.total)
            yield family

    def _engine(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        stats = self.client.stats
        usage = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
        for name, text, value in (
            ("num_requests_running", "Sequences that the engine is working on.", stats.running),
            ("num_requests_waiting", "Sequences that wait inside the engine.", stats.waiting),
            ("num_requests_queued", "Sequences that wait for their first token.", self.queued),
            ("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", usage),
        ):
            yield GaugeMetricFamily(f"firstlight_{name}", text, value=value)
        for name, text, total in (
            ("num_preemptions", "Sequences put back because the KV cache was full.", stats.preemptions_total),
            (
                "prefix_cache_queries",
                "Prompt tokens looked up in the prefix cache.",
                stats.prompt_tokens_total,
            ),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.cached_tokens_total),
            ("engine_steps", "Steps since the engine started.", stats.steps_total),
            ("engine_restarts", "How often the engine was started again.", self.client.restarts),
            ("engine_sleeps", "How often the engine has fallen asleep.", self.client.sleeps),
            ("engine_wakes", "How often the engine has woken.", self.client.wakes),
        ):
            yield CounterMetricFamily(f"firstlight_{name}", text, value=total)

    def _start(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        state = GaugeMetricFamily(
            "firstlight_state", "1 for the state that the engine is in.", labels=["state"]
        )
        for name in _STATES:
            state.add_metric([name], float(self.client.state == name))
        yield state
        if self.client.wake_seconds is not None:
            text = "How long the engine took to wake, the last time."
            yield GaugeMetricFamily("firstlight_wake_seconds", text, value=self.client.wake_seconds)
        marks = GaugeMetricFamily(
            "firstlight_start_mark_seconds",
            "When the start reached each mark, from execution.",
            labels=["mark"],
        )
        for name, seconds in self.client.marks.items():
            marks.add_metric([name], seconds)
        yield marks
        if self.client.info is not None:
            for name, count in self.client.info.counters.items():
                yield GaugeMetricFamily(f"firstlight_start_{name}", "Counted during the start.", value=count)
