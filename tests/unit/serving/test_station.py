"""A station: one engine with its requests, step by step, without a thread."""

from types import SimpleNamespace

import pytest
from tests.unit.serving.running import Metrics, request, served

from d2f.serving import station as module
from d2f.serving.station import Station
from d2f.serving.ticket import Job, Pace


class Letters:
    """A mailbox that keeps everything."""

    def __init__(self):
        self.updates = []

    def post(self, job, update):
        self.updates.append(update)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_clock_starts_with_the_first_step_of_a_request(monkeypatch, overlap):
    now = [0]

    def tick():
        now[0] += 1
        return now[0]

    mailbox, pace = Letters(), Pace()
    model = served(max_batch_size=1, overlap=overlap)
    station = Station(model, mailbox=mailbox, metrics=Metrics(), pace=pace)
    station.warm_up()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=tick))
    first, second = (
        Job("tiny", request(length=2), follow=True, watch=True, submitted=tick()) for _ in range(2)
    )
    station.admit([first, second])
    assert pace.num_left == 0
    begins = []
    while station.busy:
        begins.append(now[0] + 1)
        station.step()
    assert pace.num_left == 2
    # Steps take one tick and are one tick apart; a result is known a step later with overlap.
    assert first.started == begins[0]
    assert mailbox.updates[0].seconds == (3 if overlap else 1)
    end = first.update(now[0])
    assert (end.waited, end.seconds) == (2, now[0] - begins[0])
    num_steps = max(update.num_forwards for update in mailbox.updates)
    assert second.started > first.started + 2 * (num_steps - 1)
    assert second.started in begins
    ends = [update for update in mailbox.updates if update.done]
    assert [update.waited for update in ends] == [2, second.started - 2]
