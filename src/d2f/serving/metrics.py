"""What the server counts, for Prometheus."""

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
"""Those that requests are counted by."""
ERRORS = ("request", "queue_full", "unavailable", "timeout", "internal", "engine")
"""Kinds of errors: a request that failed alone, one that was refused because the queue was full or
the service not available, one that took too long, an exception nobody expected, a broken engine.
The service counts the first two and the last, who answers clients the others."""
OTHER = "other"

_STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_REQUEST_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_PER_FORWARD = (0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)


class Metrics:
    """Counters, gauges and histograms of one server, in a registry of its own.

    Label values come from known lists, so that clients cannot make the server keep more and more.

    Args:
        model_names: The served models; others are counted as "other".

    Example:
        >>> metrics = Metrics(["d2f-student"])
        >>> metrics.count_request("d2f-student", "/v1/completions", 200)
        >>> text, content_type = metrics.render()
        >>> 'endpoint="/v1/completions",model="d2f-student",status="200"} 1.0' in text.decode()
        True
    """

    def __init__(self, model_names: Iterable[str] = ()) -> None:
        self._model_names = frozenset(model_names)
        self._registry = registry = CollectorRegistry()
        # What the process takes in all; beside the engine's CPU time it tells the server's own.
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "d2f_requests",
            "HTTP requests answered.",
            ("model", "endpoint", "status"),
            registry=registry,
        )
        self._errors = Counter("d2f_errors", "Errors.", ("kind",), registry=registry)
        for kind in ERRORS:
            self._errors.labels(kind)
        self._waiting = Gauge(
            "d2f_requests_waiting", "Requests before their first step.", registry=registry
        )
        self._running = Gauge(
            "d2f_requests_running", "Requests after their first step.", registry=registry
        )
        self._pages = Gauge("d2f_kv_pages", "Pages of key/value caches.", registry=registry)
        self._free_pages = Gauge("d2f_kv_pages_free", "Those that are free.", registry=registry)
        self._tokens = Counter("d2f_tokens", "Tokens of finished responses.", registry=registry)
        self._forwards = Counter(
            "d2f_forwards", "Forwards of finished responses.", registry=registry
        )
        self._per_forward = Histogram(
            "d2f_tokens_per_forward",
            "Tokens per forward of a finished response.",
            buckets=_PER_FORWARD,
            registry=registry,
        )
        self._request_seconds = Histogram(
            "d2f_request_seconds",
            "From submission to the end of a finished response.",
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )
        self.first_text_seconds = Histogram(
            "d2f_first_text_seconds",
            "From submission to the first committed token, of streamed requests.",
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )
        self.step_seconds = Histogram(
            "d2f_step_seconds", "Steps of engines.", buckets=_STEP_SECONDS, registry=registry
        )
        self.engine_cpu = Counter(
            "d2f_engine_cpu_seconds", "CPU time of the engines' thread.", registry=registry
        )
        self.event_loop_cpu = Counter(
            "d2f_event_loop_cpu_seconds",
            "CPU time of the event loop's thread, when it last had news from an engine.",
            registry=registry,
        )

    def count_request(self, model: str | None, endpoint: str, status: int) -> None:
        """An HTTP request was answered.

        Args:
            model: As asked for; None where the endpoint has none.
            endpoint: The route's template, such as `/v1/models/{id}`; unknown ones: "other".
            status: Of HTTP.
        """
        name = "" if model is None else model if model in self._model_names else OTHER
        known = endpoint if endpoint in ENDPOINTS else OTHER
        self._requests.labels(name, known, str(status)).inc()

    def count_error(self, kind: str) -> None:
        """Something went wrong: one of `ERRORS`; others are counted as "other"."""
        self._errors.labels(kind if kind in ERRORS else OTHER).inc()

    def count_result(self, result: GenerationResult, seconds: float) -> None:
        """A request was answered, so long after it was submitted."""
        self._tokens.inc(len(result.token_ids))
        self._forwards.inc(result.num_forwards)
        self._per_forward.observe(result.tokens_per_forward)
        self._request_seconds.observe(seconds)

    def set_load(self, *, running: int, pages: Sequence[tuple[int, int]]) -> None:
        """How much is being done.

        Args:
            running: Requests after their first step.
            pages: Of each engine, and how many of them are free.
        """
        self._running.set(running)
        self._pages.set(sum(total for total, _ in pages))
        self._free_pages.set(sum(free for _, free in pages))

    def watch_waiting(self, count: Callable[[], int]) -> None:
        """Have the requests before their first step counted whenever somebody asks."""
        self._waiting.set_function(count)

    def render(self) -> tuple[bytes, str]:
        """The text that Prometheus reads, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
