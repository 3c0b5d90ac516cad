"""Times at which the steps of an engine ran, told by the device's own clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from d2f.decoding.step import StepShape

Mark = torch.cuda.Event | float


@dataclass(eq=False)
class StepTime:
    """One step; in seconds since the first step of the clock began."""

    shape: StepShape
    marks: tuple[Mark, Mark]
    begin: float = 0.0
    end: float = 0.0
    accepted: dict[int, list[int]] = field(default_factory=dict)
    """Places in the response that the step filled, for each request that it ran."""


class StepClock:
    """Notes the steps of a runner while it is in its `clock`.

    On a GPU by events around each step, which hold up neither host nor device.

    Example:
        >>> clock = StepClock(torch.device("cpu"))
        >>> shape = StepShape(num_rows=1, num_tokens=1, num_candidates=1, max_count=1, max_end=1)
        >>> with clock.step(shape):
        ...     pass
        >>> len(clock.times()), clock.seconds_waited
        (1, 0.0)
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._steps: list[StepTime] = []
        self.seconds_waited = 0.0
        """Seconds that the host waited for results."""

    @contextmanager
    def step(self, shape: StepShape) -> Iterator[StepTime]:
        """Time the step that is started in this context."""
        begin = self._mark()
        step = StepTime(shape, (begin, begin))
        yield step
        step.marks = (begin, self._mark())
        self._steps.append(step)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the wait for a step's results that happens in this context."""
        start = time.perf_counter()
        yield
        self.seconds_waited += time.perf_counter() - start

    def times(self) -> list[StepTime]:
        """All steps in order; waits for the last one."""
        if self._steps:
            origin = self._steps[0].marks[0]
            last = self._steps[-1].marks[1]
            if isinstance(last, torch.cuda.Event):
                last.synchronize()
            for step in self._steps:
                step.begin, step.end = (_seconds(origin, mark) for mark in step.marks)
        return self._steps

    def _mark(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(origin: Mark, mark: Mark) -> float:
    if isinstance(origin, torch.cuda.Event) and isinstance(mark, torch.cuda.Event):
        return origin.elapsed_time(mark) / 1000
    assert isinstance(origin, float) and isinstance(mark, float)
    return mark - origin
