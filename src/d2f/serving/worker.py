"""The thread that runs the engines."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from d2f.errors import D2FError
from d2f.serving.job import Job
from d2f.serving.mailbox import Mailbox
from d2f.serving.metrics import Metrics
from d2f.serving.pace import Pace
from d2f.serving.refusal import Unavailable
from d2f.serving.served_model import ServedModel
from d2f.serving.station import Station

log = logging.getLogger(__name__)

Command = Callable[[], None]

STOPPING = "the server is stopping"
"""What is said to clients then."""


class Worker:
    """Steps the engines in turn, in a thread of its own, and does what it is told in between.

    With nothing to do it sleeps until it is told something.

    Args:
        models: With their engines, which nobody else may touch from now on.
        mailbox: Where news goes.
        metrics: Where it counts.
        on_ready: Called on the loop once all engines are warm.
        on_end: Called on the loop at the end, with what is said to clients if it failed.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        *,
        mailbox: Mailbox,
        metrics: Metrics,
        on_ready: Command,
        on_end: Callable[[str | None], None],
    ) -> None:
        self.pace = Pace()
        self._mailbox, self._metrics = mailbox, metrics
        self._on_ready, self._on_end = on_ready, on_end
        self._stations = {
            model.name: Station(model, mailbox=mailbox, metrics=metrics, pace=self.pace)
            for model in models
        }
        self._turns = list(self._stations.values())
        """The one that stepped last comes last."""
        self._news = threading.Condition()
        self._commands: deque[Command] = deque()
        self._closed = False
        """No command is taken any more."""
        self._ended: str | None = None
        """What is said to those who still come."""
        self._draining = False
        self._ending = False
        self._cpu_seconds = 0.0
        # A process that ends without `stop` must not wait for an engine.
        self._thread = threading.Thread(target=self._run, name="d2f-engine", daemon=True)

    # --------------------------------------------------------------------------- for the service

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the end of a thread that has said that it ends."""
        self._thread.join()

    def admit(self, model_name: str, jobs: Sequence[Job]) -> asyncio.Future[None]:
        """Give requests to an engine, all or none; the answer is there when it has decided."""
        answer = asyncio.get_running_loop().create_future()
        station = self._stations[model_name]
        if not self._tell(functools.partial(self._admit, station, jobs, answer)):
            answer.set_exception(Unavailable(self._ended or STOPPING))
        return answer

    def cancel(self, model_name: str, job: Job) -> None:
        """Take a request out."""
        self._tell(functools.partial(self._stations[model_name].cancel, job))

    def drain(self) -> None:
        """End as soon as there is no request left."""
        self._tell(functools.partial(setattr, self, "_draining", True))

    def end(self) -> None:
        """End after the step that runs."""
        self._tell(functools.partial(setattr, self, "_ending", True))

    def _tell(self, command: Command) -> bool:
        """Have something done on the thread; False: it has ended."""
        with self._news:
            if not self._closed:
                self._commands.append(command)
                self._news.notify()
            return not self._closed

    # ------------------------------------------------------------------------------ on the thread

    def _run(self) -> None:
        fault: str | None = None
        try:
            for station in self._stations.values():
                station.warm_up()
            self._mailbox.call(self._on_ready)
            self._work()
            for station in self._stations.values():
                station.abort_all()
        except BaseException as error:
            # Whatever it is, nobody may wait for a thread that has gone.
            log.exception("the engine failed")
            self._metrics.count_error("engine")
            fault = _words(error)
        self._close(fault)

    def _work(self) -> None:
        while self._report() and self._carry_out():
            busy = [station for station in self._turns if station.busy]
            if busy:
                self._turns.remove(busy[0])
                self._turns.append(busy[0])
                busy[0].step()

    def _carry_out(self) -> bool:
        """Do what was told, waiting for it if there is nothing else to do; False: end."""
        with self._news:
            while not (self._commands or self._busy() or self._draining):
                self._news.wait()
        while self._commands:
            self._commands.popleft()()
        return not self._ending and (self._busy() or not self._draining)

    def _busy(self) -> bool:
        return any(station.busy for station in self._stations.values())

    def _admit(self, station: Station, jobs: Sequence[Job], answer: asyncio.Future[None]) -> None:
        ended = self._ended
        error = Unavailable(ended) if ended else self._failure_to_admit(station, jobs)
        self._mailbox.call(functools.partial(_answer, answer, error))
        if error is not None:
            # A refusal does not wait for the next step; that a request was taken may.
            self._mailbox.send()

    def _failure_to_admit(self, station: Station, jobs: Sequence[Job]) -> Exception | None:
        # A function of its own: an exception must not be kept by a frame of its own traceback.
        try:
            station.admit(jobs)
        except D2FError as refused:
            return refused
        except Exception as unexpected:
            # If it is the engine that is broken and not the request, the next step shows it.
            log.exception("a request could not be added")
            return unexpected
        return None

    def _report(self) -> bool:
        """Bring the gauges up to date and send the news; False: nobody reads them any more."""
        spent = time.thread_time()
        self._metrics.engine_cpu.inc(spent - self._cpu_seconds)
        self._cpu_seconds = spent
        stations = self._stations.values()
        self._metrics.set_load(
            running=sum(station.num_started for station in stations),
            pages=[station.pages for station in stations],
        )
        return self._mailbox.send()

    def _close(self, fault: str | None) -> None:
        """End all requests and answer all that was told meanwhile."""
        self._ended = fault or STOPPING
        with self._news:
            self._closed = True
        for station in self._stations.values():
            station.end_all(self._ended)
        while self._commands:
            self._commands.popleft()()
        self._metrics.set_load(running=0, pages=[])
        self._mailbox.call(functools.partial(self._on_end, fault))
        self._mailbox.send()


def _words(error: BaseException) -> str:
    """A fault in words for clients, which must not learn of paths and the like."""
    if isinstance(error, D2FError):
        return str(error)
    return f"the engine failed ({type(error).__name__}); the server's log says more"


def _answer(answer: asyncio.Future[None], error: Exception | None) -> None:
    if answer.done():
        return
    if error is None:
        answer.set_result(None)
    else:
        answer.set_exception(error)
