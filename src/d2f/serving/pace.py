"""The queue's pace: this module tells when a place is free, from how long recent requests took."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable

RECENT = 64
"""So many requests that ended last are what is expected of those that run."""
LEAST_SECONDS, MOST_SECONDS = 1.0, 60.0
"""Clients commonly take no longer time to wait from a server."""


class Pace:
    """Follows requests from the queue to their end. One thread writes, any may read.

    The queue has room when a request leaves it, which is when one that runs ends. Counting how many
    left in the last seconds would not do: they come and go in bursts, and idle times are no pace.

    Example:
        >>> pace = Pace()
        >>> pace.leave()
        >>> pace.begin("a", time.perf_counter())
        >>> pace.num_left, pace.seconds_for(1)
        (1, 1.0)
    """

    def __init__(self) -> None:
        self.num_left = 0
        """Requests that began, or were taken out before."""
        self._began: dict[Hashable, float] = {}
        """When each that runs did."""
        self._taken: deque[float] = deque(maxlen=RECENT)
        """Seconds from begin to end."""

    def leave(self) -> None:
        """Note that a request waits no longer."""
        self.num_left += 1

    def begin(self, request: Hashable, at: float) -> None:
        """Note that a request runs, and since when by `time.perf_counter`."""
        self._began[request] = at

    def end(self, request: Hashable, *, answered: bool) -> None:
        """Note that a request runs no longer; if it was not answered, it tells nothing."""
        began = self._began.pop(request)
        if answered:
            self._taken.append(time.perf_counter() - began)

    def seconds_for(self, num_places: int) -> float:
        """Seconds until so many requests will have left the queue: 1 to 60."""
        # Copied at one stroke, as the other thread goes on.
        began, taken = list(self._began.values()), list(self._taken)
        if not began:
            return LEAST_SECONDS
        now = time.perf_counter()
        left = sorted(_remaining(now - start, taken) for start in began)
        # Those that run end one after the other, then those that took their places.
        rounds, index = divmod(num_places - 1, len(left))
        whole = sum(taken) / len(taken) if taken else 2 * left[-1]
        return min(max(left[index] + rounds * whole, LEAST_SECONDS), MOST_SECONDS)


def _remaining(age: float, taken: list[float]) -> float:
    """What a request of this age still needs: as those that took longer did.

    Where none did it may last as long again, which is the less likely the more are known.

    Example:
        >>> _remaining(3.0, [2.0, 4.0, 8.0]), _remaining(3.0, []), _remaining(3.0, [1.0, 2.0])
        (3.0, 3.0, 1.0)
    """
    longer = [seconds - age for seconds in taken if seconds > age]
    return sum(longer) / len(longer) if longer else age / (len(taken) + 1)
