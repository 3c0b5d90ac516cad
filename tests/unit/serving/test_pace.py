"""A refused client is told the time that the queue then needs, on a clock of the test's own."""

from __future__ import annotations

import heapq
import random

import pytest

from d2f.serving import ticket
from d2f.serving.ticket import LEAST_SECONDS, MOST_SECONDS, Pace


class Queue:
    """Requests that take known times, so many at once, and a pace that is told of them."""

    def __init__(self, monkeypatch, *, at_once: int) -> None:
        self.now, self.at_once = 1000.0, at_once
        self.pace = Pace()
        self.waiting: list[float] = []
        self.running: list[tuple[float, int]] = []
        """When each ends, and its name."""
        self.num_begun = 0
        monkeypatch.setattr(ticket.time, "perf_counter", lambda: self.now)

    def put(self, *seconds: float) -> None:
        self.waiting += seconds
        self._fill()

    def _fill(self) -> None:
        while self.waiting and len(self.running) < self.at_once:
            self.num_begun += 1
            self.pace.leave()
            self.pace.begin(self.num_begun, self.now)
            heapq.heappush(self.running, (self.now + self.waiting.pop(0), self.num_begun))

    def pass_by(self, seconds: float) -> None:
        until = self.now + seconds
        while self.running and self.running[0][0] <= until:
            self.now, name = heapq.heappop(self.running)
            self.pace.end(name, answered=True)
            self._fill()
        self.now = until

    def needed(self, places: int) -> float:
        """Seconds until so many have left the queue, if all goes on as it is."""
        ends, waiting = [end for end, _ in self.running], list(self.waiting)
        heapq.heapify(ends)
        for _ in range(places):
            end = heapq.heappop(ends)
            if waiting:
                heapq.heappush(ends, end + waiting.pop(0))
        return end - self.now


@pytest.mark.parametrize("at_once", [1, 4, 64])
@pytest.mark.parametrize("seconds", [2.0, 14.0])
@pytest.mark.parametrize("idle", [0.0, 29.0, 500.0])
@pytest.mark.parametrize("places", [1, 2, 5])
def test_requests_alike(monkeypatch, at_once, seconds, idle, places):
    queue = Queue(monkeypatch, at_once=at_once)
    queue.put(*[seconds] * at_once)
    queue.pass_by(seconds + idle)
    # A lone one before a burst says nothing of the pace.
    queue.put(seconds)
    queue.pass_by(seconds + idle)
    queue.put(*[seconds] * (5 * at_once + 9))
    for _ in range(9):
        queue.pass_by(seconds / 5.7)
        expected = min(max(queue.needed(places), LEAST_SECONDS), MOST_SECONDS)
        assert queue.pace.seconds_for(places) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(6))
def test_requests_of_many_lengths(monkeypatch, seed):
    rng = random.Random(seed)
    queue = Queue(monkeypatch, at_once=rng.choice([2, 8, 32]))
    queue.put(*[rng.uniform(8, 20) for _ in range(1500)])
    told = needed = 0.0
    for _ in range(200):
        queue.pass_by(rng.uniform(0, 3))
        places = rng.choice([1, 1, 3, 10])
        told += queue.pace.seconds_for(places)
        needed += min(max(queue.needed(places), LEAST_SECONDS), MOST_SECONDS)
    # Who ends first is known beforehand to nobody, so that it takes less than one would expect.
    assert 0.6 * needed < told < 1.8 * needed


def test_of_the_first_requests_only_their_age_is_known(monkeypatch):
    queue = Queue(monkeypatch, at_once=1)
    assert queue.pace.seconds_for(1) == LEAST_SECONDS
    queue.put(15.0, 15.0)
    waits = []
    while len(queue.waiting) == 1:
        waits.append(queue.pace.seconds_for(1))
        queue.pass_by(waits[-1])
    assert waits == [1.0, 1.0, 2.0, 4.0, 8.0]


def test_what_was_not_answered_tells_nothing(monkeypatch):
    queue = Queue(monkeypatch, at_once=2)
    queue.put(10.0, 10.0)
    queue.pass_by(10.0)
    queue.put(10.0)
    queue.pace.end(3, answered=False)
    queue.running.clear()
    queue.put(10.0)
    queue.pass_by(4.0)
    assert queue.pace.seconds_for(1) == pytest.approx(6.0)


def test_nobody_is_sent_away_for_long(monkeypatch):
    queue = Queue(monkeypatch, at_once=1)
    queue.put(*[100.0] * 9)
    queue.pass_by(150.0)
    assert queue.pace.seconds_for(8) == MOST_SECONDS
