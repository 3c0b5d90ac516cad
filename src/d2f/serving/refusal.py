"""Why the service takes a request not now, or not any more."""

from __future__ import annotations

import math

from d2f.errors import D2FError


class QueueFull(D2FError):
    """As many requests wait as may; the same request can be served later.

    Args:
        retry_after: Seconds after which a new attempt makes sense, at least 1.

    Example:
        >>> str(QueueFull(2.0))
        'the queue is full; try again in 2 s'
    """

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the queue is full; try again in {math.ceil(retry_after)} s")
        self.retry_after = retry_after


class Unavailable(D2FError):
    """The service is about to stop, has stopped or has failed."""
