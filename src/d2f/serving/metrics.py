"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable


class Metrics:
    """Counters, gauges and histograms of one server, in a registry of its own.

    Args:
        model_names: The served models; others are counted as "other".
    """

    def __init__(self, model_names: Iterable[str] = ()) -> None:
        raise NotImplementedError

    def count_request(self, model: str | None, endpoint: str, status: int) -> None:
        """An HTTP request was answered.

        Args:
            model: As asked for; None where the endpoint has none.
            endpoint: The route's template, such as `/v1/models/{id}`; unknown ones: "other".
            status: Of HTTP.
        """
        raise NotImplementedError

    def count_error(self, kind: str) -> None:
        """Something went wrong: `timeout`, `internal`, …; unknown ones are counted as "other"."""
        raise NotImplementedError

    def render(self) -> tuple[bytes, str]:
        """The text that Prometheus reads, and its content type."""
        raise NotImplementedError
