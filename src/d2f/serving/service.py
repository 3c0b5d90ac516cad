"""The engines as the event loop sees them: requests go in, tickets come out.

A thread steps the engines in turn, and carries out between two steps what the event loop tells it.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial

from d2f.engine.request import Request
from d2f.errors import ConfigError, D2FError, RequestError
from d2f.serving.errors import QueueFull, Unavailable
from d2f.serving.metrics import Metrics
from d2f.serving.served_model import ServedModel
from d2f.serving.station import Station
from d2f.serving.ticket import Job, Mailbox, Pace, Ticket

log = logging.getLogger(__name__)

STOPPING = "the server is stopping"
"""The message to clients whose requests come, or still run, when the server stops."""


class ServiceState(Enum):
    """The life of a service."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"


class Service:
    """Runs the engines of several models in one thread, for an event loop in another.

    Only the event loop's thread may call its methods. From `start` to `stop` nobody else may touch
    the engines. With nothing to do the thread sleeps.

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
        """Reason why the service failed, in words for clients."""
        self._metrics, self._pace = metrics, Pace()
        self._num_submitted = 0
        self._started, self._ended = asyncio.Event(), asyncio.Event()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # A daemon: a process that ends without `stop` must not wait for an engine.
        self._thread = threading.Thread(target=self._run, name="d2f-engine", daemon=True)
        # The rest is the thread's.
        self._closed: str | None = None
        """The message to clients that come after the thread's end; None before it."""
        self._draining = self._ending = False
        self._cpu_seconds = 0.0

    # ----------------------------------------------------------------- called on the event loop

    def start(self) -> None:
        """Start the engines' thread, which makes the caches and warms up; call it on the loop.

        Requests are taken from now on; the state is READY once they would be served at once.
        """
        metrics = self._metrics
        self._mailbox = mailbox = Mailbox(asyncio.get_running_loop(), metrics)
        self._stations = {
            name: Station(model, mailbox=mailbox, metrics=metrics, pace=self._pace)
            for name, model in self.models.items()
        }
        self._turns = list(self._stations.values())
        """The stations; the one that stepped latest comes last."""
        metrics.watch_waiting(lambda: self.num_waiting)
        self._thread.start()

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
        return 0 if self._ended.is_set() else self._num_submitted - self._pace.num_left

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
        self._require_open()
        self._require_room(len(requests))
        station, now = self._stations[model_name], time.perf_counter()
        jobs = [Job(model_name, request, follow, watch, now) for request in requests]
        tickets = [Ticket(job, self._cancel) for job in jobs]
        self._num_submitted += len(jobs)
        answer = asyncio.get_running_loop().create_future()
        self._commands.put(partial(self._admit, station, jobs, answer))
        try:
            await answer
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
        if self._thread.ident is not None:
            if self.state in (ServiceState.STARTING, ServiceState.READY):
                self.state = ServiceState.DRAINING
            self._commands.put(partial(setattr, self, "_draining", True))
            try:
                await asyncio.wait_for(self._ended.wait(), drain_seconds)
            except TimeoutError:
                self._commands.put(partial(setattr, self, "_ending", True))
                await self._ended.wait()
            self._thread.join()
        self.state = ServiceState.STOPPED
        self._started.set()

    def _require_open(self) -> None:
        if self.state is ServiceState.FAILED:
            raise Unavailable(self.fault or "")
        if self.state in (ServiceState.DRAINING, ServiceState.STOPPED):
            raise Unavailable(STOPPING)
        if self._thread.ident is None:
            raise Unavailable("the server has not started")

    def _require_room(self, count: int) -> None:
        most, waiting = self.max_waiting, self.num_waiting
        if count > most:
            raise RequestError(
                f"{count} responses are asked for at once, but only {most} may wait; ask for fewer"
            )
        if waiting + count > most:
            self._metrics.count_error("queue_full")
            raise QueueFull(self._pace.seconds_for(waiting + count - most))

    def _cancel(self, job: Job) -> None:
        self._commands.put(partial(self._stations[job.model_name].cancel, job))

    def _on_ready(self) -> None:
        if self.state is ServiceState.STARTING:
            self.state = ServiceState.READY
        self._started.set()

    def _on_end(self, fault: str | None) -> None:
        # Commands that came too late for the thread.
        while not self._commands.empty():
            self._commands.get()()
        if fault is not None:
            self.state, self.fault = ServiceState.FAILED, fault
        self._started.set()
        self._ended.set()

    # ---------------------------------------------------------------------- called on the thread

    def _run(self) -> None:
        """Work until told to stop, until an engine fails, or until the event loop is closed."""
        fault: str | None = None
        try:
            for station in self._turns:
                station.warm_up()
            self._mailbox.call(self._on_ready)
            self._work()
            for station in self._turns:
                station.abort_all()
        except BaseException as error:
            # Nobody may wait for a thread that has gone, whatever ended it.
            log.exception("the engine failed")
            self._metrics.count_error("engine")
            # Clients must not learn of paths and the like, which foreign errors name.
            name = type(error).__name__
            fault = f"the engine failed ({name}); the server's log says more"
            if isinstance(error, D2FError):
                fault = str(error)
        self._closed = fault or STOPPING
        for station in self._turns:
            station.end_all(self._closed)
        self._metrics.set_load(running=0, pages=[])
        self._mailbox.call(partial(self._on_end, fault))
        self._mailbox.send()

    def _work(self) -> None:
        while self._report() and self._carry_out():
            busy = [station for station in self._turns if station.busy]
            if busy:
                self._turns.remove(busy[0])
                self._turns.append(busy[0])
                busy[0].step()

    def _carry_out(self) -> bool:
        """Carry out the commands, waiting for one if no engine is busy; False: the thread ends."""
        wait = not (self._busy() or self._draining)
        while wait or not self._commands.empty():
            self._commands.get()()
            wait = False
        return not self._ending and (self._busy() or not self._draining)

    def _busy(self) -> bool:
        return any(station.busy for station in self._turns)

    def _admit(self, station: Station, jobs: Sequence[Job], answer: asyncio.Future[None]) -> None:
        error = self._failure_to_admit(station, jobs)
        self._mailbox.call(partial(_answer, answer, error))
        if error is not None:
            # A refusal is sent at once; an acceptance may wait for the next step.
            self._mailbox.send()

    def _failure_to_admit(self, station: Station, jobs: Sequence[Job]) -> Exception | None:
        # A function of its own: an exception must not be kept by a frame of its own traceback.
        if self._closed is not None:
            return Unavailable(self._closed)
        try:
            station.admit(jobs)
        except D2FError as refused:
            return refused
        except Exception as unexpected:
            # If the engine is broken and not the request, the next step shows it.
            log.exception("a request could not be added")
            return unexpected
        return None

    def _report(self) -> bool:
        """Bring the gauges up to date and send the news; False if nobody reads them any more."""
        spent = time.thread_time()
        self._metrics.engine_cpu.inc(spent - self._cpu_seconds)
        self._cpu_seconds = spent
        self._metrics.set_load(
            running=sum(station.num_started for station in self._turns),
            pages=[station.pages for station in self._turns],
        )
        return self._mailbox.send()


def _answer(answer: asyncio.Future[None], error: Exception | None) -> None:
    if answer.done():
        return
    if error is None:
        answer.set_result(None)
    else:
        answer.set_exception(error)
