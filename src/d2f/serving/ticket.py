"""What a client holds of a request in the service."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable

from d2f.errors import RequestError
from d2f.serving.job import Job
from d2f.serving.update import Update

MOST_UNREAD = 256
"""Updates that are kept for a slow reader of a watched request; then the oldest goes. Each has the
whole state, so nothing but the steps between is lost."""


class Ticket:
    """A request in the service: its updates, and the means to end it.

    An asynchronous iterator of updates. A slow reader gets the newest state, once; nothing queues
    up but the steps of a watched request, of which the last `MOST_UNREAD` are kept. Only one task
    may read a ticket, either the updates (`async for`) or the last one (`last`).
    A ticket that is dropped before its end cancels its request, as `cancel` does at once.

    Only the thread of the service's event loop may use it.

    Args:
        job: The request.
        on_cancel: Tells the engines' thread.
    """

    def __init__(self, job: Job, on_cancel: Callable[[Job], None]) -> None:
        self._job, self._on_cancel = job, on_cancel
        self._newest: Update | None = None
        self._unread: deque[Update] = deque(maxlen=MOST_UNREAD if job.watch else 1)
        self._over = False
        """No other update will come."""
        self._reader: asyncio.Future[None] | None = None
        job.ticket = weakref.ref(self)

    def __aiter__(self) -> Ticket:
        """What a step commits comes as an update; of a watched request each step does."""
        return self

    async def __anext__(self) -> Update:
        """The next state not seen yet; ends after the update with a result or an error."""
        while not self._unread:
            if self._over:
                raise StopAsyncIteration
            await self._news()
        return self._unread.popleft()

    async def last(self) -> Update:
        """Wait for the end and return the last update, which has the result.

        Raises:
            RequestError: The request failed, or was cancelled.
            Unavailable: The service ended or failed before.
        """
        while not self._over:
            await self._news()
        if self._newest is None or not self._newest.done:
            raise RequestError("the request was cancelled")
        if self._newest.error is not None:
            raise self._newest.error
        return self._newest

    def cancel(self) -> None:
        """Take the request out; its pages are free within one step. May be called at any time.

        The iteration ends without another update.
        """
        if not self._over:
            self.close()
            self._job.cancelled = True
            self._on_cancel(self._job)

    def __del__(self) -> None:
        self.cancel()

    # --------------------------------------------------------------------------- for the service

    def receive(self, update: Update) -> None:
        """Take the newest state."""
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

    async def _news(self) -> None:
        if self._reader is not None:
            raise RuntimeError("another task reads this ticket")
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None
