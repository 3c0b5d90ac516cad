"""The thread that runs the engines: it steps them in turn and posts what is new of their requests.

A `Station` is one engine with its requests; the `Worker` is the thread, which carries out between
two steps what the event loop tells it.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from d2f.engine.request import Output, Request
from d2f.errors import D2FError
from d2f.serving.errors import Unavailable
from d2f.serving.metrics import Metrics
from d2f.serving.served_model import ServedModel
from d2f.serving.ticket import Job, Mailbox, Pace

log = logging.getLogger(__name__)

Command = Callable[[], None]

STOPPING = "the server is stopping"
"""The message to clients whose requests come, or still run, when the server stops."""


class Station:
    """One engine with its requests: steps it and posts their updates."""

    def __init__(
        self, model: ServedModel, *, mailbox: Mailbox, metrics: Metrics, pace: Pace
    ) -> None:
        self._model, self._engine = model, model.engine
        self._mailbox, self._metrics, self._pace = mailbox, metrics, pace
        self._jobs: dict[int, Job] = {}
        """The engine's requests by its numbers."""
        config, device = self._engine.config, self._engine.model.device
        self._behind = device.type == "cuda" if config.overlap is None else config.overlap
        """Whether the outcome of a step is known after the next step only."""
        self._previous_begin = 0.0
        self.num_started = 0
        """Requests that run: their first step has begun."""

    @property
    def busy(self) -> bool:
        """Whether the engine has requests."""
        return bool(self._jobs)

    @property
    def pages(self) -> tuple[int, int]:
        """The number of pages of the engine's cache, and of the free ones among them."""
        status = self._engine.status()
        return status.num_pages, status.num_free_pages

    def warm_up(self) -> None:
        """Answer one request, so that the first client need not wait for the cache to be made.

        Raises:
            D2FError: There is no room for a cache, or the model cannot answer.
        """
        spec = self._engine.model.spec
        policy = spec.recommended_policy
        most = 32 if policy is None else policy.block_size
        request = Request(
            prompt_ids=[0],
            max_new_tokens=min(most, spec.max_positions - 1),
            strategy=self._model.strategy,
        )
        self._engine.generate([request])
        self._engine.forget_prompts()

    def admit(self, jobs: Sequence[Job]) -> None:
        """Give requests to the engine, all or none.

        Raises:
            RequestError: One cannot be served.
            ConfigError: Unknown strategy or option.
        """
        added: list[Job] = []
        try:
            for job in jobs:
                # The client may have gone while the request was on its way.
                if not job.cancelled:
                    job.number = self._engine.add(job.request, watch=job.watch)
                    self._jobs[job.number] = job
                    added.append(job)
        except BaseException:
            for job in added:
                self.cancel(job)
            raise
        finally:
            for _ in range(len(jobs) - len(added)):
                self._pace.leave()

    def cancel(self, job: Job) -> None:
        """Take a request out of the engine, if it is still there."""
        if job.number is not None:
            self._engine.abort(job.number)
            self._forget(job)

    def end_all(self, reason: str) -> None:
        """End all requests with `Unavailable`; the engine, which may be broken, is not called."""
        now = time.perf_counter()
        for job in list(self._jobs.values()):
            self._forget(job)
            # An error of its own for each: a raised exception keeps the raiser's frames alive.
            self._mailbox.post(job, job.update(now, error=Unavailable(reason)))

    def abort_all(self) -> None:
        """Take all requests out of the engine."""
        for number in self._jobs:
            self._engine.abort(number)

    def step(self) -> None:
        """Make one step of the engine and post what is new."""
        begin = time.perf_counter()
        outputs = self._engine.step()
        now = time.perf_counter()
        self._metrics.step_seconds.observe(now - begin)
        for output in outputs:
            self._end(output, begin, now)
        for number, job in self._jobs.items():
            if job.follow or job.started is None:
                self._report(number, job, begin, now)
        self._previous_begin = begin

    def _report(self, number: int, job: Job, begin: float, now: float) -> None:
        """Post an update of a request that goes on, if the client wants one and there is news."""
        progress = self._engine.progress(number)
        if progress.num_forwards == 0:
            return
        self._start(job, begin)
        num_committed = len(progress.token_ids)
        new_text = num_committed > job.num_committed
        if not job.follow or not (
            new_text or (job.watch and progress.num_forwards > job.num_forwards)
        ):
            return
        if job.num_committed == 0 and new_text:
            self._metrics.first_text_seconds.observe(now - job.submitted)
        job.num_forwards, job.num_committed = progress.num_forwards, num_committed
        update = job.update(
            now,
            num_forwards=progress.num_forwards,
            token_ids=progress.token_ids,
            blocks=self._engine.view(number) if job.watch else [],
        )
        self._mailbox.post(job, update)

    def _start(self, job: Job, begin: float) -> None:
        """Note a request's first step; `begin` is when the latest step began."""
        if job.started is not None:
            return
        if self._behind and self._previous_begin > job.submitted:
            begin = self._previous_begin
        job.started = max(begin, job.submitted)
        self.num_started += 1
        self._pace.leave()
        self._pace.begin(job, job.started)

    def _end(self, output: Output, begin: float, now: float) -> None:
        """Post the result or the error of a request."""
        job = self._jobs[output.request_id]
        self._start(job, begin)
        result, metrics = output.result, self._metrics
        self._forget(job, answered=result is not None)
        if result is None:
            metrics.count_error("request")
            state: dict[str, Any] = {"num_forwards": job.num_forwards, "error": output.error}
        else:
            if job.follow and job.num_committed == 0:
                metrics.first_text_seconds.observe(now - job.submitted)
            metrics.count_result(result, now - job.submitted)
            state = {"num_forwards": result.num_forwards, "token_ids": result.token_ids}
        update = job.update(now, blocks=output.blocks, result=result, **state)
        self._mailbox.post(job, update)

    def _forget(self, job: Job, *, answered: bool = False) -> None:
        assert job.number is not None
        del self._jobs[job.number]
        job.number = None
        if job.started is None:
            self._pace.leave()
        else:
            self._pace.end(job, answered=answered)
            self.num_started -= 1


class Worker(threading.Thread):
    """A thread that steps the engines in turn and carries out commands in between.

    With nothing to do it sleeps until a command comes. On the event loop it calls `on_ready` once
    all engines are warm and `on_end` when the thread ends, with what clients are told if it failed.
    Nobody else may touch the engines of the models meanwhile.
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
        # A daemon: a process that ends without `stop` must not wait for an engine.
        super().__init__(name="d2f-engine", daemon=True)
        self.pace = Pace()
        self._mailbox, self._metrics = mailbox, metrics
        self._on_ready, self._on_end = on_ready, on_end
        self._stations = {
            model.name: Station(model, mailbox=mailbox, metrics=metrics, pace=self.pace)
            for model in models
        }
        self._turns = list(self._stations.values())
        """The stations; the one that stepped latest comes last."""
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._closed: str | None = None
        """The message to clients that come after the end; None before it."""
        self._draining = self._ending = False
        self._cpu_seconds = 0.0

    # ----------------------------------------------------------------- called on the event loop

    def admit(self, model_name: str, jobs: Sequence[Job]) -> asyncio.Future[None]:
        """Give requests to an engine, all or none; the future ends once the engine has decided."""
        answer = asyncio.get_running_loop().create_future()
        self._commands.put(partial(self._admit, self._stations[model_name], jobs, answer))
        return answer

    def cancel(self, job: Job) -> None:
        """Take a request out of its engine."""
        self._commands.put(partial(self._stations[job.model_name].cancel, job))

    def drain(self) -> None:
        """End as soon as no request is left."""
        self._commands.put(partial(setattr, self, "_draining", True))

    def end(self) -> None:
        """End after the step that runs."""
        self._commands.put(partial(setattr, self, "_ending", True))

    def _farewell(self, fault: str | None) -> None:
        # Commands that came too late for the thread.
        while not self._commands.empty():
            self._commands.get()()
        self._on_end(fault)

    # ---------------------------------------------------------------------- called on the thread

    def run(self) -> None:
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
        self._mailbox.call(partial(self._farewell, fault))
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
