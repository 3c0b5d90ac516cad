"""The metrics of a server, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from d2f.engine.request import GenerationResult

ENDPOINTS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/models",
    "/v1/models/{id}",
    "/health",
    "/health/live",
    "/health/ready",
    "/metrics",
    "/openapi.json",
    "/page",
)
"""The endpoints under which requests are counted; all else is "other"."""
ERRORS = ("request", "queue_full", "unavailable", "timeout", "internal", "engine")
"""Kinds of errors; the service counts the first two and the last, the gateway the others."""
OTHER = "other"

_STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_REQUEST_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_PER_FORWARD = (0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)


class Metrics:
    """The counters, gauges and histograms of one server, in a registry of its own.

    Label values come from known lists, so that clients cannot make the number of series grow.
    """

    def __init__(self, model_names: Iterable[str] = ()) -> None:
        self._model_names = frozenset(model_names)
        self._registry = registry = CollectorRegistry()
        # The CPU time of the process; less the engine's it is what the server itself takes.
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"d2f_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"d2f_{name}", text, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"d2f_{name}", text, buckets=buckets, registry=registry)

        self._requests = counter(
            "requests", "HTTP requests answered.", "model", "endpoint", "status"
        )
        self._errors = counter("errors", "Errors.", "kind")
        for kind in ERRORS:
            self._errors.labels(kind)
        self._waiting = gauge("requests_waiting", "Requests before their first step.")
        self._running = gauge("requests_running", "Requests after their first step.")
        self._pages = gauge("kv_pages", "Pages of key/value caches.")
        self._free_pages = gauge("kv_pages_free", "Free pages of key/value caches.")
        self._tokens = counter("tokens", "Tokens of finished responses.")
        self._forwards = counter("forwards", "Forwards of finished responses.")
        self._per_forward = histogram(
            "tokens_per_forward", "Tokens per forward of a finished response.", _PER_FORWARD
        )
        self._request_seconds = histogram(
            "request_seconds",
            "From submission to the end of a finished response.",
            _REQUEST_SECONDS,
        )
        self.first_text_seconds = histogram(
            "first_text_seconds",
            "From submission to the first committed token, of streamed requests.",
            _REQUEST_SECONDS,
        )
        self.step_seconds = histogram("step_seconds", "Steps of engines.", _STEP_SECONDS)
        self.engine_cpu = counter("engine_cpu_seconds", "CPU time of the engines' thread.")
        self.event_loop_cpu = counter(
            "event_loop_cpu_seconds",
            "CPU time of the event loop's thread, when it last had news from an engine.",
        )

    def count_request(self, model: str | None, endpoint: str, status: int) -> None:
        """Count an answered HTTP request; `model` is None where the endpoint has none."""
        name = "" if model is None else model if model in self._model_names else OTHER
        known = endpoint if endpoint in ENDPOINTS else OTHER
        self._requests.labels(name, known, str(status)).inc()

    def count_error(self, kind: str) -> None:
        """Count an error of a kind of `ERRORS`; other kinds are counted as "other"."""
        self._errors.labels(kind if kind in ERRORS else OTHER).inc()

    def count_result(self, result: GenerationResult, seconds: float) -> None:
        """Count an answer and the seconds since its request was submitted."""
        self._tokens.inc(len(result.token_ids))
        self._forwards.inc(result.num_forwards)
        self._per_forward.observe(result.tokens_per_forward)
        self._request_seconds.observe(seconds)

    def set_load(self, *, running: int, pages: Sequence[tuple[int, int]]) -> None:
        """Set the gauges of the load; `pages` are each engine's, and the free ones among them."""
        self._running.set(running)
        self._pages.set(sum(total for total, _ in pages))
        self._free_pages.set(sum(free for _, free in pages))

    def watch_waiting(self, count: Callable[[], int]) -> None:
        """Set the function that tells the number of requests before their first step."""
        self._waiting.set_function(count)

    def render(self) -> tuple[bytes, str]:
        """The metrics in Prometheus' text format, and the content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
