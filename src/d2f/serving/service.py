"""The engines behind an event loop."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from d2f.engine.request import Request
from d2f.serving.metrics import Metrics
from d2f.serving.refusal import QueueFull as QueueFull
from d2f.serving.refusal import Unavailable as Unavailable
from d2f.serving.served_model import ServedModel
from d2f.serving.ticket import Ticket


class ServiceState(Enum):
    """The life of a service."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"


class Service:
    """Runs the engines of several models in one thread, for an event loop in another.

    Args:
        models: At least one, with different names; the first is the default.
        max_waiting: Most requests that may wait for their first step, of all models together.
        metrics: Where it counts.
    """

    state: ServiceState
    fault: str | None
    """Why it failed, in words for clients."""
    models: dict[str, ServedModel]
    """By name, the default first."""

    def __init__(
        self, models: Sequence[ServedModel], *, max_waiting: int = 256, metrics: Metrics
    ) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Start the thread, which makes the caches and warms up; call it on the event loop.

        Requests are taken from now on; the state is READY once they would be served at once.
        """
        raise NotImplementedError

    async def ready(self) -> None:
        """Wait until it is ready.

        Raises:
            Unavailable: It failed before.
        """
        raise NotImplementedError

    async def submit(
        self, model_name: str, requests: Sequence[Request], *, watch: bool = False
    ) -> list[Ticket]:
        """Queue requests, all or none; returns once the engine has taken or refused them.

        Args:
            model_name: One of the served models.
            requests: Of one client; in the order of the tickets.
            watch: Updates have the blocks.

        Raises:
            RequestError: A request cannot be served, or no model has this name.
            ConfigError: Unknown strategy or option.
            QueueFull: Too many requests wait.
            Unavailable: It is draining, or has failed or stopped.
        """
        raise NotImplementedError

    async def stop(self, drain_seconds: float) -> None:
        """Take no more requests, let those it has end, and end what is left after that time."""
        raise NotImplementedError
