"""The engines as the event loop sees them: requests go in, tickets come out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from enum import Enum

from d2f.engine.request import Request
from d2f.errors import ConfigError, RequestError
from d2f.serving.errors import QueueFull, Unavailable
from d2f.serving.metrics import Metrics
from d2f.serving.served_model import ServedModel
from d2f.serving.ticket import Job, Mailbox, Ticket
from d2f.serving.worker import STOPPING, Worker


class ServiceState(Enum):
    """The life of a service."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"


class Service:
    """Runs the engines of several models in one thread, for an event loop in another.

    Only the event loop's thread may call its methods.

    Args:
        models: At least one, with different names; the first is the default.
        max_waiting: Most requests that may wait for their first step, of all models together.
        metrics: Counts.

    Raises:
        ConfigError: There is no model, or two have the same name.
    """

    def __init__(
        self, models: Sequence[ServedModel], *, max_waiting: int = 256, metrics: Metrics
    ) -> None:
        self.models = {model.name: model for model in models}
        """The models by name, the default first."""
        if not models:
            raise ConfigError("there is no model to serve; give at least one")
        if len(self.models) < len(models):
            names = ", ".join(model.name for model in models)
            raise ConfigError(f"models to serve: {names}; each needs a name of its own")
        self.max_waiting = max_waiting
        self.state = ServiceState.STARTING
        self.fault: str | None = None
        """Why the service failed, in words for clients."""
        self._metrics = metrics
        self._worker: Worker | None = None
        self._num_submitted = 0
        self._started, self._ended = asyncio.Event(), asyncio.Event()

    def start(self) -> None:
        """Start the engines' thread, which makes the caches and warms up; call it on the loop.

        Requests are taken from now on; the state is READY once they would be served at once.
        """
        assert self._worker is None, "a service starts once"
        self._worker = Worker(
            list(self.models.values()),
            mailbox=Mailbox(asyncio.get_running_loop(), self._metrics),
            metrics=self._metrics,
            on_ready=self._on_ready,
            on_end=self._on_end,
        )
        self._metrics.watch_waiting(lambda: self.num_waiting)
        self._worker.start()

    async def ready(self) -> None:
        """Wait until the service is ready.

        Raises:
            Unavailable: It failed before, or was stopped.
        """
        await self._started.wait()
        self._require_open()

    @property
    def num_waiting(self) -> int:
        """The number of requests before their first step."""
        if self._worker is None or self._ended.is_set():
            return 0
        return self._num_submitted - self._worker.pace.num_left

    async def submit(
        self,
        model_name: str,
        requests: Sequence[Request],
        *,
        follow: bool = True,
        watch: bool = False,
    ) -> list[Ticket]:
        """Queue requests, all or none; returns once the engine has taken or refused them.

        Args:
            model_name: One of the served models.
            requests: Requests of one client, in the order of the tickets.
            follow: Whether there are updates before the end, which cost some time each.
            watch: Whether updates carry the blocks.

        Raises:
            RequestError: A request cannot be served.
            ConfigError: Unknown strategy or option.
            QueueFull: Too many requests wait.
            Unavailable: The service is draining, has failed or has stopped.
        """
        worker = self._require_open()
        self._require_room(len(requests), worker)
        now = time.perf_counter()
        jobs = [Job(model_name, request, follow, watch, now) for request in requests]
        tickets = [Ticket(job, worker.cancel) for job in jobs]
        self._num_submitted += len(jobs)
        try:
            await worker.admit(model_name, jobs)
        except BaseException:
            # The engine has taken none, unless it was the client that gave up.
            for ticket in tickets:
                ticket.cancel()
            raise
        return tickets

    async def stop(self, drain_seconds: float) -> None:
        """Take no more requests, let the open ones end, and end what is left after that time.

        What is left ends with `Unavailable`. The engines can be used again afterwards.
        """
        if self._worker is not None:
            if self.state in (ServiceState.STARTING, ServiceState.READY):
                self.state = ServiceState.DRAINING
            self._worker.drain()
            try:
                await asyncio.wait_for(self._ended.wait(), drain_seconds)
            except TimeoutError:
                self._worker.end()
                await self._ended.wait()
            self._worker.join()
        self.state = ServiceState.STOPPED
        self._started.set()

    def _require_open(self) -> Worker:
        if self.state is ServiceState.FAILED:
            raise Unavailable(self.fault or "")
        if self.state in (ServiceState.DRAINING, ServiceState.STOPPED):
            raise Unavailable(STOPPING)
        if self._worker is None:
            raise Unavailable("the server has not started")
        return self._worker

    def _require_room(self, count: int, worker: Worker) -> None:
        most, waiting = self.max_waiting, self.num_waiting
        if count > most:
            raise RequestError(
                f"{count} responses are asked for at once, but only {most} may wait; ask for fewer"
            )
        if waiting + count > most:
            self._metrics.count_error("queue_full")
            raise QueueFull(worker.pace.seconds_for(waiting + count - most))

    def _on_ready(self) -> None:
        if self.state is ServiceState.STARTING:
            self.state = ServiceState.READY
        self._started.set()

    def _on_end(self, fault: str | None) -> None:
        if fault is not None:
            self.state, self.fault = ServiceState.FAILED, fault
        self._started.set()
        self._ended.set()
