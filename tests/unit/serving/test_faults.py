"""A fault ends the requests and servers that it must, and nothing else."""

import asyncio
import logging

import pytest
from tests.unit.serving.running import (
    Gate,
    Metrics,
    all_free,
    break_steps,
    eventually,
    request,
    running,
    served,
)

from d2f.errors import RequestError
from d2f.serving.errors import Unavailable
from d2f.serving.service import Service, ServiceState

SECRET = "/home/somebody/secret.py is broken"


def test_a_broken_engine_fails_everything_at_once(caplog):
    models = [served("one"), served("two")]

    async def run():
        async with running(*models) as service:
            # First, so that nothing is broken yet, however slow the machine is.
            [other] = await service.submit("two", [request(length=300)])
            break_steps(models[0].engine, 3, RuntimeError(SECRET))
            mine = await service.submit("one", [request(), request(7)])

            async def stream():
                return [update async for update in mine[0]][-1].error

            ends = await asyncio.gather(
                stream(), mine[1].last(), other.last(), return_exceptions=True
            )
            assert [type(end) for end in ends] == [Unavailable] * 3
            assert service.state is ServiceState.FAILED
            assert "engine failed (RuntimeError)" in service.fault
            messages = [*map(str, ends), service.fault]
            with pytest.raises(Unavailable, match="engine failed") as refusal:
                await service.submit("two", [request()])
            messages.append(str(refusal.value))
            with pytest.raises(Unavailable):
                await service.ready()
            assert not any("secret" in message for message in messages)
            assert 'd2f_errors_total{kind="engine"} 1.0' in rendered(service)
            assert service.num_waiting == 0

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
    assert SECRET in caplog.text
    assert "Traceback" in caplog.text


def rendered(service):
    return service._metrics.render()[0].decode()


def test_requests_on_their_way_to_an_engine_that_breaks_do_not_hang():
    model = served()

    async def run():
        async with running(model) as service:
            break_steps(model.engine, 0, RuntimeError("broken"))
            gate = Gate(model.engine)
            first = asyncio.ensure_future(service.submit("tiny", [request()]))
            await eventually(lambda: gate.num_arrived == 1)
            second = asyncio.ensure_future(service.submit("tiny", [request()]))
            await asyncio.sleep(0)
            gate.open()
            # The engine had taken the first, and broke before it could take the second.
            [ticket] = await first
            with pytest.raises(Unavailable):
                await ticket.last()
            with pytest.raises(Unavailable):
                await second

    asyncio.run(run())


def test_an_engine_that_cannot_warm_up_is_never_ready(caplog):
    async def run():
        service = Service([served(kv_cache_bytes=1)], metrics=Metrics())
        service.start()
        waiting = asyncio.ensure_future(service.submit("tiny", [request()]))
        with pytest.raises(Unavailable, match="hold no page"):
            await service.ready()
        with pytest.raises(Unavailable, match="hold no page"):
            await waiting
        assert service.state is ServiceState.FAILED
        await service.stop(1)
        assert service.state is ServiceState.STOPPED

    asyncio.run(run())
    assert "hold no page" in caplog.text


def test_what_goes_wrong_while_one_request_is_added_is_its_own(caplog):
    model = served()
    add = model.engine.add

    def picky(one, **settings):
        if one.prompt_ids[0] == 13:
            raise ZeroDivisionError(SECRET)
        return add(one, **settings)

    model.engine.add = picky

    async def run():
        async with running(model) as service:
            [ticket] = await service.submit("tiny", [request(length=40)])
            with pytest.raises(ZeroDivisionError):
                await service.submit("tiny", [request(7), request(13)])
            assert (await ticket.last()).result is not None
            assert service.state is ServiceState.READY
            assert all_free(model)

    asyncio.run(run())
    assert SECRET in caplog.text


def test_a_request_that_fails_fails_alone():
    model = served()

    def decode(token_ids):
        raise ValueError("no such character")

    model.engine._tokenizer.decode, kept = decode, model.engine._tokenizer.decode

    async def run():
        async with running(model) as service:
            bad, good = await service.submit("tiny", [request(stop=["x"]), request(7)])
            with pytest.raises(RequestError, match="could not decode"):
                await bad.last()
            assert len((await good.last()).token_ids) == 24
            [streamed] = await service.submit("tiny", [request(stop=["x"])])
            updates = [update async for update in streamed]
            assert isinstance(updates[-1].error, RequestError)
            assert [update.done for update in updates].count(True) == 1
            assert service.state is ServiceState.READY
            assert all_free(model)

    try:
        asyncio.run(run())
    finally:
        model.engine._tokenizer.decode = kept


def test_a_thread_whose_loop_has_gone_ends():
    model = served()

    async def run():
        service = Service([model], metrics=Metrics())
        service.start()
        await service.ready()
        tickets = await service.submit("tiny", [request(length=400)])
        return service, tickets

    service, tickets = asyncio.run(run())
    service._thread.join(timeout=30)
    assert not service._thread.is_alive()
    assert all_free(model)
    del tickets
