"""One engine with the requests it has, on the engines' thread."""

from __future__ import annotations

import time
from collections.abc import Sequence

from d2f.engine.request import Output, Request
from d2f.serving.job import Job
from d2f.serving.mailbox import Mailbox
from d2f.serving.metrics import Metrics
from d2f.serving.pace import Pace
from d2f.serving.refusal import Unavailable
from d2f.serving.served_model import ServedModel
from d2f.serving.update import Update


class Station:
    """Steps one engine and posts what is new of its requests.

    Args:
        model: With the engine, which nobody else may touch.
        mailbox: Where the news goes.
        metrics: Where it counts.
        pace: Learns of each request when it waits no longer, and when it ends.
    """

    def __init__(
        self, model: ServedModel, *, mailbox: Mailbox, metrics: Metrics, pace: Pace
    ) -> None:
        self._model, self._engine = model, model.engine
        self._mailbox, self._metrics, self._pace = mailbox, metrics, pace
        self._jobs: dict[int, Job] = {}
        """By the engine's number."""
        config, device = self._engine.config, self._engine.model.device
        self._behind = device.type == "cuda" if config.overlap is None else config.overlap
        """What a step did is known after the next one."""
        self._previous_begin = 0.0
        self.num_started = 0
        """Jobs that do not wait any more."""

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._jobs)

    @property
    def pages(self) -> tuple[int, int]:
        """Pages of its cache, and how many of them are free."""
        status = self._engine.status()
        return status.num_pages, status.num_free_pages

    def warm_up(self) -> None:
        """Answer a request, so that the cache is there and the first client does not wait for it.

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
                # Its client may have gone while it was on the way.
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
        """Take a request out, if it is still there."""
        if job.number is not None:
            self._engine.abort(job.number)
            self._forget(job)

    def end_all(self, reason: str) -> None:
        """End all requests as unavailable, without a word to the engine, which may be broken."""
        now = time.perf_counter()
        for job in list(self._jobs.values()):
            self._forget(job)
            # Each has its own: a raised exception carries what the one who raised it was doing.
            error = Unavailable(reason)
            self._mailbox.post(
                job, Update(seconds=job.seconds(now), waited=job.waited, error=error)
            )

    def abort_all(self) -> None:
        """Take all requests out of the engine."""
        for number in self._jobs:
            self._engine.abort(number)

    def step(self) -> None:
        """One step of the engine, and the news of it."""
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
        """Post what is new of a request that goes on, if somebody wants to know."""
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
        update = Update(
            seconds=job.seconds(now),
            waited=job.waited,
            num_forwards=progress.num_forwards,
            token_ids=progress.token_ids,
            blocks=self._engine.view(number) if job.watch else [],
        )
        self._mailbox.post(job, update)

    def _start(self, job: Job, begin: float) -> None:
        """Note a first step; `begin` is that of the step last made."""
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
        self._forget(job, answered=output.result is not None)
        result, metrics = output.result, self._metrics
        if result is None:
            metrics.count_error("request")
        else:
            if job.follow and job.num_committed == 0:
                metrics.first_text_seconds.observe(now - job.submitted)
            metrics.count_result(result, now - job.submitted)
        self._mailbox.post(
            job,
            Update(
                seconds=job.seconds(now),
                waited=job.waited,
                num_forwards=job.num_forwards if result is None else result.num_forwards,
                token_ids=[] if result is None else result.token_ids,
                blocks=output.blocks,
                result=result,
                error=output.error,
            ),
        )

    def _forget(self, job: Job, *, answered: bool = False) -> None:
        assert job.number is not None
        del self._jobs[job.number]
        job.number = None
        if job.started is None:
            self._pace.leave()
        else:
            self._pace.end(job, answered=answered)
            self.num_started -= 1
