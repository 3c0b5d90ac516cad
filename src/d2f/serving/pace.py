"""How fast requests leave the queue."""

from __future__ import annotations

import time
from collections import deque

WINDOW_SECONDS = 30.0
LEAST_SECONDS, MOST_SECONDS = 1.0, 60.0


class Pace:
    """Counts the requests that leave the queue. One thread writes, any may read.

    Example:
        >>> pace = Pace()
        >>> pace.leave(started=True)
        >>> pace.num_left, pace.seconds_for(0)
        (1, 1.0)
    """

    def __init__(self) -> None:
        self.num_left = 0
        """Requests that began, or were taken out before."""
        self._starts: deque[float] = deque(maxlen=1024)
        self._recent: tuple[float, int] | None = None
        """Time of the oldest start that counts, and how many there were since."""

    def leave(self, *, started: bool) -> None:
        """Note that a request waits no longer."""
        self.num_left += 1
        if not started:
            return
        now = time.perf_counter()
        self._starts.append(now)
        while self._starts[0] < now - WINDOW_SECONDS:
            self._starts.popleft()
        self._recent = self._starts[0], len(self._starts)

    def seconds_for(self, num_waiting: int) -> float:
        """Seconds until so many will have started, going by the last half minute: 1 to 60."""
        if self._recent is None:
            return LEAST_SECONDS
        oldest, count = self._recent
        expected = num_waiting * (time.perf_counter() - oldest) / count
        return min(max(expected, LEAST_SECONDS), MOST_SECONDS)
