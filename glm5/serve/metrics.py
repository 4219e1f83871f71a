"""`GET /metrics` in Prometheus' text format: what the requests were like, and what the engine does now.

Each application has a registry of its own. Requests are counted by route, never by raw path, so that nobody can make
the page grow; nothing of a request's text is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from glm5.serve.access_log import Figures

TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 600)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)
REQUEST_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 300, 600, 1800, 3600)
LENGTHS = (1, 8, 32, 128, 512, 2048, 8192, 32768, 131072, 202752)


class Metrics:
    """The counters of one server. `gauges` is asked at each scrape for what is true now, by name."""

    def __init__(self, gauges: Callable[[], dict[str, float]], engine_stats: Callable[[], Any] | None = None) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Now(gauges, engine_stats))

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"glm5_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"glm5_{name}", text, registry=self.registry, buckets=buckets)

        self.requests = counter("http_requests", "Requests that ended.", ("method", "route", "status"))
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of the requests that ended.")
        self.cached_tokens = counter("prompt_tokens_cached", "Of these, taken from the prefix cache.")
        self.output_tokens = counter("output_tokens", "Sampled tokens of the requests that ended.")
        self.finished = counter("samples", "Samples that ended, by reason.", ("finish_reason",))
        self.first_token = histogram("time_to_first_token_seconds", "From request to first token.", FIRST_TOKEN_SECONDS)
        self.per_token = histogram(
            "time_per_output_token_seconds", "Mean time between the tokens of a sample, by request.", TOKEN_SECONDS
        )
        self.seconds = histogram("request_seconds", "From request to the end of the response.", REQUEST_SECONDS)
        self.prompt_length = histogram("prompt_length_tokens", "Prompt tokens per request.", LENGTHS)
        self.output_length = histogram("output_length_tokens", "Sampled tokens per request.", LENGTHS)

    def observe(self, figures: Figures) -> None:
        """Counts one request that ended."""
        self.requests.labels(figures.method, figures.route, str(figures.status)).inc()
        if figures.prompt_tokens is None or figures.output_tokens is None:
            return
        self.seconds.observe(figures.seconds)
        self.prompt_tokens.inc(figures.prompt_tokens)
        self.cached_tokens.inc(figures.cached_tokens or 0)
        self.output_tokens.inc(figures.output_tokens)
        self.prompt_length.observe(figures.prompt_tokens)
        self.output_length.observe(figures.output_tokens)
        for reason in figures.finish_reasons:
            self.finished.labels(reason).inc()
        if figures.first_token_seconds is not None:
            self.first_token.observe(figures.first_token_seconds)
        if figures.token_seconds is not None:
            self.per_token.observe(figures.token_seconds)

    def install(self, app: FastAPI) -> None:
        """Adds `GET /metrics`."""

        @app.get("/metrics")
        async def metrics() -> Response:  # as /health, never behind requests that wait for a thread
            return Response(generate_latest(self.registry), media_type=TEXT_FORMAT)


ENGINE_GAUGES = {
    "running": "Sequences that hold cache blocks.",
    "waiting": "Sequences that wait for their turn in the engine.",
    "blocks_used": "Cache blocks in use.",
    "blocks_total": "Cache blocks there are.",
    "version": "Version of the weights.",
}
ENGINE_COUNTERS = {
    "steps": "Steps of the engine.",
    "prompt_tokens": "Prompt tokens of the requests that began.",
    "cached_prompt_tokens": "Of these, taken from the prefix cache.",
    "cached_tokens": "Tokens taken from the prefix cache instead of being computed.",
    "computed_tokens": "Tokens that went through the model.",
    "sampled_tokens": "Tokens that were sampled.",
    "preemptions": "Sequences that gave their blocks back, to be computed again.",
    "drafted_tokens": "Tokens that speculation proposed.",
    "accepted_tokens": "Of these, the accepted ones.",
}


class _Now(Collector):
    """What is true at the moment of the scrape: the server's gauges and the engine's own statistics."""

    def __init__(self, gauges: Callable[[], dict[str, float]], engine_stats: Callable[[], Any] | None) -> None:
        self.gauges, self.engine_stats = gauges, engine_stats

    def describe(self) -> list[Metric]:
        return []  # the names are known at the scrape; nothing is asked when the registry is made

    def collect(self) -> Iterator[Metric]:
        for name, value in self.gauges().items():
            yield GaugeMetricFamily(f"glm5_{name}", name.replace("_", " ").capitalize() + ".", value=value)
        if self.engine_stats is None:
            return
        stats = asdict(self.engine_stats())
        for name, text in ENGINE_GAUGES.items():
            yield GaugeMetricFamily(f"glm5_engine_{name}", text, value=stats[name])
        for name, text in ENGINE_COUNTERS.items():
            yield CounterMetricFamily(f"glm5_engine_{name}", text, value=stats[name])
        used = stats["blocks_used"] / max(stats["blocks_total"], 1)
        yield GaugeMetricFamily("glm5_engine_cache_usage_ratio", "Share of the cache blocks in use.", value=used)
        hits = stats["cached_prompt_tokens"] / max(stats["prompt_tokens"], 1)
        yield GaugeMetricFamily("glm5_engine_prefix_hit_ratio", "Cached prompt tokens over all of them.", value=hits)
        if stats["drafted_tokens"]:
            share = stats["accepted_tokens"] / stats["drafted_tokens"]
            yield GaugeMetricFamily("glm5_engine_draft_acceptance_ratio", "Accepted over drafted tokens.", value=share)
