"""Requests on their way between the event loop and the engines' thread.

The two threads share a `Job`. After a step of the engine the thread posts an `Update` to the
`Mailbox`, which hands it to the `Ticket` that the client holds. `Pace` estimates when the queue has
room again.
"""

from __future__ import annotations

import asyncio
import functools
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from d2f.engine.request import BlockView, GenerationResult, Request
from d2f.errors import RequestError
from d2f.serving.metrics import Metrics

MOST_UNREAD = 256
"""Most updates of a watched request that wait for a slow reader; the oldest is dropped first. Each
has the whole state, so the reader loses nothing but the steps between."""
LEAST_SECONDS, MOST_SECONDS = 1.0, 60.0
"""Bounds of `Retry-After`; common clients wait no longer than a minute."""
_NUM_RECENT = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """The state of a request after a step of the engine."""

    seconds: float = 0.0
    """Seconds since the request's first step began; 0 before that."""
    waited: float = 0.0
    """Seconds between its submission and its first step."""
    num_forwards: int = 0
    """Model calls so far."""
    token_ids: list[int] = field(default_factory=list)
    """Tokens committed so far: the response up to its first gap."""
    blocks: list[BlockView] = field(default_factory=list)
    """The response's blocks; empty unless the request is watched."""
    result: GenerationResult | None = None
    """The result, in the last update of a request that is done."""
    error: Exception | None = None
    """The error, in the last update of a request that failed."""

    @property
    def done(self) -> bool:
        """Whether no other update follows."""
        return self.result is not None or self.error is not None


@dataclass(eq=False, slots=True)
class Job:
    """A request as the two threads share it. Each field is written by one of them only.

    All times are those of `time.perf_counter`.
    """

    model_name: str
    request: Request
    follow: bool
    """Whether updates are posted before the end."""
    watch: bool
    """Whether updates carry the blocks."""
    submitted: float

    # Written by the event loop.
    ticket: weakref.ref[Ticket] | None = None
    """Weak, so that a client that drops its ticket drops the request."""
    cancelled: bool = False

    # Written by the engines' thread.
    number: int | None = None
    """The engine's number of the request; None before the engine has it and afterwards."""
    started: float | None = None
    """Time at which the request's first step began."""
    num_forwards: int = 0
    """Forwards that the last update reported."""
    num_committed: int = 0
    """Tokens that the last update reported."""

    def update(self, now: float, **state: Any) -> Update:
        """An update with the request's times at `now`."""
        if self.started is None:
            return Update(**state)
        seconds, waited = now - self.started, self.started - self.submitted
        return Update(seconds=seconds, waited=waited, **state)


class Ticket:
    """A client's hold on a request in the service: the updates, and the means to cancel it.

    `async for` gives an update for each step that commits tokens, or for every step if the request
    is watched. A slow reader gets the newest state only; of a watched request it gets the last
    `MOST_UNREAD` updates. One task at a time may read a ticket, on the service's event loop. A
    ticket that is dropped before its end cancels its request.
    """

    def __init__(self, job: Job, on_cancel: Callable[[Job], None]) -> None:
        self._job, self._on_cancel = job, on_cancel
        self._newest: Update | None = None
        self._unread: deque[Update] = deque(maxlen=MOST_UNREAD if job.watch else 1)
        self._over = False
        """Whether no other update will come."""
        self._reader: asyncio.Future[None] | None = None
        job.ticket = weakref.ref(self)

    def __aiter__(self) -> Ticket:
        return self

    async def __anext__(self) -> Update:
        """The next unread update; the iteration ends after the one with a result or an error."""
        while not self._unread:
            if self._over:
                raise StopAsyncIteration
            await self._wait()
        return self._unread.popleft()

    async def last(self) -> Update:
        """Wait for the end and return the last update, which has the result.

        Raises:
            RequestError: The request failed, or was cancelled.
            Unavailable: The service ended or failed before.
        """
        while not self._over:
            await self._wait()
        if self._newest is None or not self._newest.done:
            raise RequestError("the request was cancelled")
        if self._newest.error is not None:
            raise self._newest.error
        return self._newest

    def cancel(self) -> None:
        """Take the request out of the engine, whose pages are free within one step.

        The iteration ends without another update. Calls after the request's end do nothing.
        """
        if not self._over:
            self.close()
            self._job.cancelled = True
            self._on_cancel(self._job)

    def __del__(self) -> None:
        self.cancel()

    # ------------------------------------------------------------------- called by the service

    def receive(self, update: Update) -> None:
        """Store an update and wake the reader."""
        if not self._over:
            self._newest = update
            self._unread.append(update)
            self._over = update.done
            self._wake()

    def close(self) -> None:
        """End the iteration without another update."""
        self._over = True
        self._unread.clear()
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def _wait(self) -> None:
        if self._reader is not None:
            raise RuntimeError("another task reads this ticket")
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None


class Mailbox:
    """Carries news from the engines' thread to the event loop, with one wake-up of it a step."""

    def __init__(self, loop: asyncio.AbstractEventLoop, metrics: Metrics) -> None:
        self._loop, self._metrics = loop, metrics
        self._news: deque[Callable[[], None]] = deque()
        self._woken = False
        """Whether the loop was woken and has not begun to fetch the news."""
        self._cpu_seconds = time.thread_time()

    def post(self, job: Job, update: Update) -> None:
        """Send an update to the job's ticket."""
        self._news.append(functools.partial(_hand_out, job, update))

    def call(self, function: Callable[[], None]) -> None:
        """Have a function called on the loop."""
        self._news.append(function)

    def send(self) -> bool:
        """Wake the loop if there is news; False if the loop is closed."""
        if self._news and not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                return False
        return True

    def _deliver(self) -> None:
        # First, so that news which come after the last look wake the loop again.
        self._woken = False
        while self._news:
            self._news.popleft()()
        spent = time.thread_time()
        self._metrics.event_loop_cpu.inc(spent - self._cpu_seconds)
        self._cpu_seconds = spent


def _hand_out(job: Job, update: Update) -> None:
    ticket = job.ticket() if job.ticket is not None else None
    if ticket is not None:
        ticket.receive(update)


class Pace:
    """Estimates when the queue has room, from how long recent requests took to answer.

    The queue has room when a request leaves it, which is when a running one ends. The rate at which
    requests left lately would mislead: they come in bursts with idle times between. One thread
    writes, any thread may read.
    """

    def __init__(self) -> None:
        self.num_left = 0
        """Requests that left the queue: they began, or were taken out before."""
        self._began: dict[Hashable, float] = {}
        """Time at which each running request began."""
        self._taken: deque[float] = deque(maxlen=_NUM_RECENT)
        """Seconds from the beginning to the end of recent requests."""

    def leave(self) -> None:
        """Count a request that waits no longer."""
        self.num_left += 1

    def begin(self, request: Hashable, at: float) -> None:
        """Note that a request runs since `at`, a time of `time.perf_counter`."""
        self._began[request] = at

    def end(self, request: Hashable, *, answered: bool) -> None:
        """Note that a request has ended; only answered ones count for the estimate."""
        began = self._began.pop(request)
        if answered:
            self._taken.append(time.perf_counter() - began)

    def seconds_for(self, num_places: int) -> float:
        """Seconds, 1 to 60, until so many requests will have left the queue."""
        # Each copy is one operation, since the other thread goes on meanwhile.
        began, taken = list(self._began.values()), list(self._taken)
        if not began:
            return LEAST_SECONDS
        now = time.perf_counter()
        left = sorted(_remaining(now - start, taken) for start in began)
        # The running requests end one after the other, then those that took their places.
        rounds, index = divmod(num_places - 1, len(left))
        whole = sum(taken) / len(taken) if taken else 2 * left[-1]
        return min(max(left[index] + rounds * whole, LEAST_SECONDS), MOST_SECONDS)


def _remaining(age: float, taken: list[float]) -> float:
    """Expected seconds until a request of this age ends, going by those that took longer.

    Where none did, it may last as long again, the less likely the more requests are known.

    Example:
        >>> _remaining(3.0, [2.0, 4.0, 8.0]), _remaining(3.0, []), _remaining(3.0, [1.0, 2.0])
        (3.0, 3.0, 1.0)
    """
    longer = [seconds - age for seconds in taken if seconds > age]
    return sum(longer) / len(longer) if longer else age / (len(taken) + 1)
