"""What the engines' thread tells the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

from d2f.serving.job import Job
from d2f.serving.metrics import Metrics
from d2f.serving.update import Update


class Mailbox:
    """Carries news from the engines' thread to the tickets, at one wake-up of the loop per step.

    What the loop has not fetched yet is replaced by what is newer, so a loop that is late finds
    one update per request; of a watched request it finds one per step.

    Args:
        loop: Where the tickets are.
        metrics: Counts the CPU time of the loop's thread.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, metrics: Metrics) -> None:
        self._loop, self._metrics = loop, metrics
        self._lock = threading.Lock()
        self._updates: dict[Job, list[Update]] = {}
        self._calls: list[Callable[[], None]] = []
        self._woken = False
        """The loop will come; it need not be called again."""
        self._cpu_seconds = time.thread_time()

    def post(self, job: Job, update: Update) -> None:
        """Add to what is new of a watched request; of others replace it."""
        with self._lock:
            if job.watch:
                self._updates.setdefault(job, []).append(update)
            else:
                self._updates[job] = [update]

    def call(self, function: Callable[[], None]) -> None:
        """Have a function called on the loop, before the tickets get their updates."""
        with self._lock:
            self._calls.append(function)

    def send(self) -> bool:
        """Wake the loop if there is news; False if it is closed and nobody will read any."""
        with self._lock:
            needed = not self._woken and bool(self._updates or self._calls)
            self._woken = self._woken or needed
        if not needed:
            return True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            return False
        return True

    def _deliver(self) -> None:
        with self._lock:
            updates, self._updates = self._updates, {}
            calls, self._calls = self._calls, []
            self._woken = False
        for function in calls:
            function()
        for job, news in updates.items():
            ticket = job.ticket() if job.ticket is not None else None
            if ticket is not None:
                for update in news:
                    ticket.receive(update)
        spent = time.thread_time()
        self._metrics.event_loop_cpu.inc(spent - self._cpu_seconds)
        self._cpu_seconds = spent
