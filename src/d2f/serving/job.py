"""A request on its way between the event loop and the engines' thread."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

from d2f.engine.request import Request

if TYPE_CHECKING:
    from d2f.serving.ticket import Ticket


@dataclass(eq=False, slots=True)
class Job:
    """What the two threads share of a request. Each field is written by one of them only."""

    request: Request
    follow: bool
    """It is reported step by step, not only at its end."""
    watch: bool
    """Its updates have the blocks."""
    submitted: float
    """By `time.perf_counter`, as all times here."""

    # Written by the event loop.
    ticket: weakref.ref[Ticket] | None = None
    """Weak: a client that drops its ticket drops the request."""
    cancelled: bool = False

    # Written by the engines' thread.
    number: int | None = None
    """The engine's; None before and after."""
    started: float | None = None
    """When its first step began."""
    num_forwards: int = 0
    """As last reported."""
    num_committed: int = 0
    """Tokens, as last reported."""

    @property
    def waited(self) -> float:
        """Seconds before its first step; 0 while it waits."""
        return 0.0 if self.started is None else self.started - self.submitted

    def seconds(self, now: float) -> float:
        """Since its first step began; 0 before."""
        return 0.0 if self.started is None else now - self.started
