"""A client's hold on a request."""

import asyncio

import pytest
from tests.unit.serving.running import request

from d2f.errors import RequestError
from d2f.serving.ticket import MOST_UNREAD, Job, Ticket, Update


def make(watch=False):
    cancelled = []
    return Ticket(
        Job("tiny", request(), follow=True, watch=watch, submitted=0.0), cancelled.append
    ), cancelled


def test_a_ticket_that_is_dropped_cancels_its_request_once():
    ticket, cancelled = make()
    job = ticket._job
    ticket.cancel()
    ticket.cancel()
    del ticket
    assert cancelled == [job]
    assert job.cancelled
    ticket, cancelled = make()
    del ticket
    assert len(cancelled) == 1


def test_a_ticket_that_is_done_has_nothing_to_cancel():
    ticket, cancelled = make()
    ticket.receive(Update(error=RequestError("bad")))
    ticket.cancel()
    del ticket
    assert cancelled == []


def test_a_cancelled_ticket_ends_its_readers():
    async def run():
        streamed, _ = make()
        streamed.receive(Update(token_ids=[1]))
        streamed.cancel()
        streamed.receive(Update(token_ids=[1, 2]))
        assert [update async for update in streamed] == []
        waited, _ = make()
        reader = asyncio.ensure_future(waited.last())
        await asyncio.sleep(0)
        waited.cancel()
        with pytest.raises(RequestError, match="was cancelled"):
            await reader

    asyncio.run(run())


def test_a_reader_may_give_up_and_another_go_on():
    async def run():
        ticket, _ = make()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ticket.__anext__(), 0)
        reader = asyncio.ensure_future(ticket.__anext__())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another task"):
            await ticket.last()
        ticket.receive(Update(token_ids=[1]))
        ticket.receive(Update(token_ids=[1, 2]))
        assert (await reader).token_ids == [1, 2]
        ticket.receive(Update(error=RequestError("bad")))
        with pytest.raises(RequestError, match="bad"):
            await ticket.last()

    asyncio.run(run())


@pytest.mark.parametrize(("watch", "seen"), [(False, [3]), (True, [1, 2, 3])])
def test_a_slow_reader_misses_no_step_of_a_watched_request(watch, seen):
    async def run():
        ticket, _ = make(watch)
        for step in (1, 2):
            ticket.receive(Update(num_forwards=step))
        ticket.receive(Update(num_forwards=3, error=RequestError("bad")))
        return [update.num_forwards async for update in ticket]

    assert asyncio.run(run()) == seen


def test_what_a_reader_never_reads_is_bounded():
    async def run():
        ticket, _ = make(watch=True)
        for step in range(2 * MOST_UNREAD):
            ticket.receive(Update(num_forwards=step))
        ticket.receive(Update(error=RequestError("bad")))
        updates = [update async for update in ticket]
        assert len(updates) == MOST_UNREAD
        assert updates[-1].done

    asyncio.run(run())
