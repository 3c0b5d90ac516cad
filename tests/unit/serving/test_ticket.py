"""A client's hold on a request."""

import asyncio

import pytest
from tests.unit.serving.running import request

from d2f.errors import RequestError
from d2f.serving.job import Job
from d2f.serving.ticket import Ticket
from d2f.serving.update import Update


def make():
    cancelled = []
    return Ticket(
        Job(request(), follow=True, watch=False, submitted=0.0), cancelled.append
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
