"""One engine of the server with its requests, stepped by the thread of the service."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from d2f.engine.request import Output, Request
from d2f.serving.errors import Unavailable
from d2f.serving.metrics import Metrics
from d2f.serving.served_model import ServedModel
from d2f.serving.ticket import Job, Mailbox, Pace


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
