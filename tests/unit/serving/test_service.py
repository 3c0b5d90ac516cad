"""The engines behind an event loop: answers, limits and the ends that a service may come to."""

import asyncio
import gc
import itertools
import random

import pytest
from tests.unit.serving.running import (
    Gate,
    Metrics,
    all_free,
    cached_model,
    count_calls,
    eventually,
    request,
    running,
    served,
)

from d2f import DecodingPolicy, Request
from d2f.errors import ConfigError, RequestError
from d2f.serving.errors import QueueFull, Unavailable
from d2f.serving.service import Service, ServiceState
from d2f.serving.ticket import Job, Pace, Ticket, Update

POLICY = DecodingPolicy(block_size=6, confidence_threshold=0.3)


def expected(requests, family="llada"):
    """Each answered alone."""
    engine = served(family=family).engine
    return [engine.generate([one])[0].token_ids for one in requests]


async def read(ticket, rng):
    """Read a ticket in one of the ways that clients may; the ids, None if it was cancelled."""
    way = rng.choice(["last", "stream", "cancel", "cancel unread", "drop", "cancel task"])
    if way == "last":
        return (await ticket.last()).result.token_ids
    if way == "cancel unread":
        ticket.cancel()
    elif way == "cancel task":
        task = asyncio.ensure_future(ticket.last())
        await asyncio.sleep(rng.random() * 0.05)
        task.cancel()
        await asyncio.wait([task])
        ticket.cancel()
    seen, update = [], None
    async for update in ticket:
        assert update.token_ids[: len(seen)] == seen
        seen = update.token_ids
        if way in ("cancel", "drop") and rng.random() < 0.3:
            break
    if way == "cancel":
        ticket.cancel()
        ticket.cancel()
    return update.result.token_ids if update is not None and update.done else None


@pytest.mark.parametrize("overlap", [False, True])
def test_clients_that_come_and_go_get_their_own_answers_and_leave_no_page(overlap):
    rng = random.Random(6)
    requests = [
        Request(
            prompt_ids=[rng.randrange(90) for _ in range(rng.randint(1, 12))],
            max_new_tokens=rng.randint(1, 30),
            policy=POLICY,
            strategy=rng.choice(["pipelined", "serial"]),
            temperature=rng.choice([0.0, 0.7]),
            seed=number,
        )
        for number in range(60)
    ]
    model = served(kv_cache_bytes=60_000, overlap=overlap)

    async def client(service, one):
        await asyncio.sleep(rng.random() * 0.2)
        settings = {name: rng.random() < 0.5 for name in ("follow", "watch")}
        [ticket] = await service.submit("tiny", [one], **settings)
        return await read(ticket, rng)

    async def run():
        async with running(model) as service:
            answers = await asyncio.gather(*(client(service, one) for one in requests))
            gc.collect()
            await eventually(lambda: all_free(model))
            await eventually(lambda: "d2f_requests_running 0.0" in rendered(service))
            assert service.num_waiting == 0
        return answers

    answers = asyncio.run(run())
    given = [answer for answer in answers if answer is not None]
    assert 10 < len(given) < len(requests)
    assert all(a is None or a == e for a, e in zip(answers, expected(requests), strict=True))


def rendered(service):
    return service._metrics.render()[0].decode()


def test_updates_grow_up_to_the_result():
    async def run():
        async with running(served()) as service:
            tickets = await service.submit("tiny", [request(policy=POLICY)], watch=True)
            return [update async for update in tickets[0]]

    updates = asyncio.run(run())
    *running_updates, last = updates
    assert [update.done for update in updates] == [False] * len(running_updates) + [True]
    assert last.token_ids == last.result.token_ids
    assert last.num_forwards == last.result.num_forwards
    for one, other in itertools.pairwise(updates):
        assert one.num_forwards < other.num_forwards or other.done
        assert 0 < one.seconds < other.seconds
        assert other.token_ids[: len(one.token_ids)] == one.token_ids
    assert all(update.blocks and update.waited > 0 for update in updates)
    shown = [token for block in last.blocks for token in block.token_ids]
    assert shown[: len(last.token_ids)] == last.token_ids


def test_blocks_and_progress_are_made_for_those_who_look():
    model = served()
    model.engine.view, views = count_calls(model.engine.view)
    model.engine.progress, looks = count_calls(model.engine.progress)

    async def run():
        async with running(model) as service:
            tickets = await service.submit("tiny", [request(), request(7)], follow=False)
            updates = [[update async for update in ticket] for ticket in tickets]
            assert [len(each) for each in updates] == [1, 1]
            quiet = looks[0]
            [ticket] = await service.submit("tiny", [request(8)])
            assert [update.blocks async for update in ticket].count([]) > 0
            return quiet

    quiet = asyncio.run(run())
    assert views[0] == 0
    # That their first step has been made is looked for in any case.
    assert quiet == 2
    assert looks[0] - quiet > 4


def test_a_slow_reader_finds_the_newest_state_once():
    async def run():
        async with running(served()) as service:
            slow, fast = await service.submit("tiny", [request(length=8), request(7, length=30)])
            await fast.last()
            return [update async for update in slow]

    [update] = asyncio.run(run())
    assert update.result is not None


def test_the_loop_is_woken_once_per_step():
    model = served()
    model.engine.step, steps = count_calls(model.engine.step)

    async def run():
        async with running(model) as service:
            loop = asyncio.get_running_loop()
            wake, wakes = count_calls(loop.call_soon_threadsafe)
            loop.call_soon_threadsafe = wake
            requests = [request(first, policy=POLICY) for first in range(8)]
            tickets = await service.submit("tiny", requests, watch=True)
            updates = await asyncio.gather(*(drained(ticket) for ticket in tickets))
            return sum(updates), wakes[0]

    num_updates, num_wakes = asyncio.run(run())
    assert num_wakes <= steps[0] < num_updates


async def drained(ticket):
    return len([update async for update in ticket])


def test_an_idle_thread_sleeps():
    metrics = Metrics(["tiny"])
    metrics.set_load, rounds = count_calls(metrics.set_load)

    async def run():
        async with running(served(), metrics=metrics) as service:
            [ticket] = await service.submit("tiny", [request(length=2)])
            await ticket.last()
            await asyncio.sleep(0.02)
            before = rounds[0]
            await asyncio.sleep(0.1)
            assert rounds[0] == before

    asyncio.run(run())


def test_models_take_turns():
    order = []
    models = [served("one"), served("two"), served("three")]
    for model in models:
        step = model.engine.step

        def noted(step=step, name=model.name):
            order.append(name)
            return step()

        model.engine.step = noted

    async def run():
        async with running(*models) as service:
            tickets = [
                (await service.submit(name, [request(length=40, policy=POLICY)]))[0]
                for name in ("one", "two")
            ]
            results = [await ticket.last() for ticket in tickets]
            return [update.result.token_ids for update in results]

    assert asyncio.run(run()) == expected([request(length=40, policy=POLICY)]) * 2
    assert "three" not in order
    both = order[order.index("two") : -order[::-1].index("one") or None]
    assert all(one != other for one, other in itertools.pairwise(both))


def test_requests_of_one_submission_are_taken_all_or_none():
    model = served()

    async def run():
        async with running(model) as service:
            with pytest.raises(RequestError, match="outside the vocabulary"):
                await service.submit("tiny", [request(), Request(prompt_ids=[5000])])
            with pytest.raises(ConfigError, match="unknown strategy"):
                await service.submit("tiny", [request(), request(strategy="pipelind")])
            assert service.num_waiting == 0
            assert all_free(model)
            assert await service.submit("tiny", []) == []

    asyncio.run(run())


def test_the_queue_is_bounded():
    model = served(max_batch_size=1)

    async def run():
        metrics = Metrics(["tiny"])
        async with running(model, max_waiting=3, metrics=metrics) as service:
            with pytest.raises(RequestError, match="4 responses are asked for at once"):
                await service.submit("tiny", [request()] * 4)
            gate = Gate(model.engine)
            first = asyncio.ensure_future(service.submit("tiny", [request()]))
            gate.let(1)
            [running_ticket] = await first
            assert service.num_waiting == 0
            second = asyncio.ensure_future(service.submit("tiny", [request(7), request(8)]))
            await eventually(lambda: service.num_waiting == 2)
            with pytest.raises(QueueFull) as full:
                await service.submit("tiny", [request(9)] * 2)
            assert full.value.retry_after >= 1
            assert "d2f_requests_waiting 2.0" in rendered(service)
            gate.open()
            tickets = [running_ticket, *await second]
            updates = [await ticket.last() for ticket in tickets]
            assert updates[2].waited > updates[1].waited > updates[0].waited
            assert 'd2f_errors_total{kind="queue_full"} 1.0' in rendered(service)

    asyncio.run(run())


def test_a_refused_client_is_told_when_there_is_room_for_it(monkeypatch):
    monkeypatch.setattr(Pace, "seconds_for", lambda self, places: 10.5 * places)
    model = served(max_batch_size=1)

    async def run():
        async with running(model, max_waiting=3) as service:
            gate = Gate(model.engine)
            first = asyncio.ensure_future(service.submit("tiny", [request()]))
            gate.let(1)
            await first
            second = asyncio.ensure_future(service.submit("tiny", [request(7), request(8)]))
            await eventually(lambda: service.num_waiting == 2)
            # Not when all that wait have begun: the queue needs no more than this to be free.
            for count, seconds in ((2, 11), (3, 21)):
                with pytest.raises(QueueFull, match=f"try again in {seconds} s"):
                    await service.submit("tiny", [request(9)] * count)
            gate.open()
            await second

    asyncio.run(run())


def test_a_client_that_leaves_while_it_waits_makes_room():
    model = served(max_batch_size=1)

    async def run():
        async with running(model, max_waiting=1) as service:
            gate = Gate(model.engine)
            first = asyncio.ensure_future(service.submit("tiny", [request()]))
            gate.let(1)
            [_ticket] = await first
            leaving = asyncio.ensure_future(service.submit("tiny", [request(7)]))
            await eventually(lambda: service.num_waiting == 1)
            leaving.cancel()
            gate.let(1)
            await eventually(lambda: service.num_waiting == 0)
            assert leaving.cancelled()
            last = asyncio.ensure_future(service.submit("tiny", [request(8)]))
            gate.open()
            assert (await (await last)[0].last()).result is not None

    asyncio.run(run())


@pytest.mark.parametrize("way", ["cancel", "drop"])
def test_pages_of_a_client_that_leaves_are_free_within_one_step(way):
    model = served()

    async def run():
        async with running(model) as service:
            gate = Gate(model.engine)
            submission = asyncio.ensure_future(service.submit("tiny", [request(length=200)]))
            gate.let(1)
            [ticket] = await submission
            assert not all_free(model)
            if way == "cancel":
                ticket.cancel()
            del ticket, submission
            gate.let(1)
            await eventually(lambda: all_free(model))

    asyncio.run(run())


def test_a_drain_lets_requests_end_and_takes_no_more():
    model = served()

    async def run():
        service = Service([model], metrics=Metrics(["tiny"]))
        service.start()
        [ticket] = await service.submit("tiny", [request(length=40)])
        stopping = asyncio.ensure_future(service.stop(60))
        await asyncio.sleep(0)
        assert service.state is ServiceState.DRAINING
        with pytest.raises(Unavailable, match="stopping"):
            await service.submit("tiny", [request()])
        update = await ticket.last()
        await stopping
        assert service.state is ServiceState.STOPPED
        assert not service._thread.is_alive()
        return update.result.token_ids

    assert asyncio.run(run()) == expected([request(length=40)])[0]


def test_what_outlasts_a_drain_ends_with_a_word():
    model = served(max_batch_size=1)

    async def run():
        async with running(model) as service:
            long = [request(first, length=400) for first in (1, 7)]
            tickets = await service.submit("tiny", long)
            await service.stop(0.01)
            for ticket in tickets:
                with pytest.raises(Unavailable, match="stopping"):
                    await ticket.last()
            with pytest.raises(Unavailable, match="stopping"):
                await service.submit("tiny", [request()])
            assert all_free(model)
            assert not service._thread.is_alive()

    asyncio.run(run())


def test_a_stopped_service_leaves_engines_that_work():
    model = served()

    async def run():
        for _ in range(2):
            async with running(model) as service:
                [ticket] = await service.submit("tiny", [request()])
                assert (await ticket.last()).token_ids == expected([request()])[0]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        ("llada", "pipelined"),
        ("llada", "vanilla"),
        ("llada", "dual-cache"),
        ("llada", "dllm-cache"),
        ("Dream", "serial"),
        ("qwen2", "autoregressive"),
    ],
)
def test_it_is_ready_once_its_engines_have_answered(family, strategy):
    model = served(family=family, strategy=strategy)
    policy = cached_model(family).spec.recommended_policy
    assert policy is None or policy.block_size > 0

    async def run():
        service = Service([model], metrics=Metrics(["tiny"]))
        with pytest.raises(Unavailable, match="not started"):
            await service.submit("tiny", [request()])
        service.start()
        assert service.state is ServiceState.STARTING
        await service.ready()
        assert service.state is ServiceState.READY
        paged = strategy in ("pipelined", "serial", "autoregressive")
        assert (model.engine.status().num_pages > 0) == paged
        [ticket] = await service.submit("tiny", [request(length=8, strategy=strategy)])
        updates = [update async for update in ticket]
        await service.stop(0)
        return updates[-1].token_ids

    answer = asyncio.run(run())
    assert [answer] == expected([request(length=8, strategy=strategy)], family)


def test_nothing_is_kept_of_requests_that_are_done():
    model = served(max_batch_size=64)

    async def run():
        async with running(model, max_waiting=500) as service:
            for round_ in range(10):
                requests = [request(first % 90, length=1) for first in range(200)]
                tickets = await service.submit("tiny", requests, watch=round_ % 2 == 0)
                await asyncio.gather(*(ticket.last() for ticket in tickets))
            del tickets, requests
            [station] = service._stations.values()
            assert not station._jobs
            assert not service._mailbox._news
            await asyncio.sleep(0)
            gc.collect()
            left = [one for one in gc.get_objects() if type(one) in (Job, Ticket, Update)]
            assert not left
            assert len(rendered(service).splitlines()) < 250

    asyncio.run(run())


@pytest.mark.parametrize(
    ("models", "message"),
    [([], "no model to serve"), (["a", "a"], "a, a; each needs a name of its own")],
)
def test_models_that_cannot_be_served_together(models, message):
    with pytest.raises(ConfigError, match=message):
        Service([served(name) for name in models], metrics=Metrics())
