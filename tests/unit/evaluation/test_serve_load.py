"""The load on a server: what is measured, and that no wrong answer passes."""

from __future__ import annotations

import asyncio
import json
import socket
import threading

import pytest
from benchmarks.load import client
from benchmarks.load import server as measured
from benchmarks.load.answers import VERDICTS, first_block_seconds, judge
from benchmarks.load.client import Connection, ServedAnswer, Task, run
from benchmarks.load.server import ServerProcess, Target, fetch
from benchmarks.load.turns import (
    count_wrong,
    idle_report,
    plan_turns,
    run_load,
    run_turn,
    summarize,
)
from tests.unit.evaluation.fake_server import FAULTS, POOL, STREAMED_ONLY, FakeServer

from d2f.diffusion.policy import DecodingPolicy
from d2f.engine.engine import Engine
from d2f.engine.request import Request
from d2f.errors import ConfigError, D2FError
from d2f.testing import tiny_model


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(client, "_PAUSE", 0.01)


def ask_all(server, *, streamed=True, num_clients=1, seconds=None, timeout=5.0):
    """Answers and verdicts of a load that this process makes itself."""
    host, port = server.url.removeprefix("http://").split(":")
    task = Task(
        host=host,
        port=int(port),
        path="/v1/completions",
        headers={},
        bodies=[{"prompt": expected.prompt, "stream": streamed} for expected in POOL],
        first=0,
        streamed=streamed,
        num_clients=num_clients,
        seconds=seconds,
        timeout=timeout,
    )
    answers = [ServedAnswer(**answer) for answer in run(task)["answers"]]
    return answers, [judge(answer, POOL) for answer in answers]


def target(server, **settings):
    return Target.find(server.url, max_tokens=16, **settings)


@pytest.mark.parametrize("streamed", [True, False])
def test_right_answers_are_right(streamed):
    with FakeServer() as server:
        answers, verdicts = ask_all(server, streamed=streamed)
    assert verdicts == ["right"] * len(POOL)
    assert [answer.text for answer in answers] == [expected.text for expected in POOL]
    for answer in answers:
        assert 0 < answer.first_text <= answer.seconds
        assert len(answer.pieces) == (3 if streamed else 1)
        assert answer.usage["num_forwards"] == 2


@pytest.mark.parametrize(
    ("fault", "streamed"),
    [(f, s) for f in FAULTS for s in (True, False) if s or f not in STREAMED_ONLY],
)
def test_every_fault_is_caught_and_named(fault, streamed):
    with FakeServer(fault=fault, every=2) as server:
        _, verdicts = ask_all(server, streamed=streamed)
    assert verdicts == ["right", FAULTS[fault], "right"]


def test_faults_cover_all_verdicts():
    assert set(FAULTS.values()) == set(VERDICTS) - {"right"}


def test_what_is_no_http_is_lost():
    def serve(listener, reply):
        for _ in POOL:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(reply)

    for reply in (b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", b""):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=serve, args=(listener, reply))
            thread.start()
            server = type("Raw", (), {"url": f"http://127.0.0.1:{listener.getsockname()[1]}"})
            _, verdicts = ask_all(server)
            thread.join()
        assert verdicts == ["lost"] * len(POOL)


def test_a_silent_server_and_none_at_all_are_lost():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = type("Silent", (), {"url": f"http://127.0.0.1:{listener.getsockname()[1]}"})
        answers, verdicts = ask_all(server, timeout=0.05)
    assert verdicts == ["lost"] * len(POOL)
    assert answers[0].fault == "no end within 0.05 s"
    answers, verdicts = ask_all(server)
    assert verdicts == ["lost"] * len(POOL)
    assert answers[0].fault.startswith("no connection")


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n1\r\nd\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nabcd",
    ],
    ids=["length", "chunks", "until the end"],
)
def test_an_answer_may_come_byte_by_byte(reply):
    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        for byte in reply:
            writer.write(bytes([byte]))
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def ask():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            connection = Connection("127.0.0.1", server.sockets[0].getsockname()[1])
            exchange = await connection.ask(b"GET / HTTP/1.1\r\n\r\n", timeout=5)
            connection.close()
        return exchange

    exchange = asyncio.run(ask())
    assert (exchange.status, exchange.body, exchange.complete) == (200, b"abcd", True)


def test_turns_are_counted_with_the_server_s_own_counters():
    with FakeServer(fault="wrong", every=5) as server:
        turns = run_load(target(server), POOL, mode="both", num_clients=3, seconds=0.4)
        requests = server.num_requests
    rows = summarize(turns)
    assert [row["name"] for row in rows] == ["streamed", "plain"]
    assert sum(row["num_requests"] for row in rows) == requests
    assert sum(row["num_wrong"] for row in rows) == count_wrong(turns) == requests // 5
    for row in rows:
        assert row["num_requests"] == row["num_right"] + row["num_wrong"]
        assert row["tokens_per_forward"] == pytest.approx(4, abs=0.5)
        assert row["cpu"]["other_over_engine"] == pytest.approx(0.25)
        assert row["cpu"]["engine_ms_per_token"] == pytest.approx(4)
        assert row["request_ms"]["p50"] <= row["request_ms"]["p99"]
        assert row["resident_mb"] == [500.0]
        assert row["load_cpu_share"] > 0
    assert rows[0]["first_text_ms"]["p50"] <= rows[0]["request_ms"]["p99"]
    assert rows[1]["first_text_ms"] is None


def test_a_turn_goes_on_where_the_last_one_stopped():
    with FakeServer() as server:
        settings = {"mode": "plain", "num_clients": 1, "seconds": None}
        turn = run_turn(target(server), POOL, first=5, **settings)
    assert [answer.prompt for answer in turn.answers] == [2, 0, 1]


def test_refusals_are_counted_apart_and_clients_go_on():
    with FakeServer(fault="429", every=2) as server:
        [turn] = run_load(target(server), POOL, mode="plain", num_clients=2, seconds=0.2)
    [row] = summarize([turn])
    assert row["num_refused"] == pytest.approx(row["num_requests"] / 2, abs=1)
    assert row["num_right"] == row["num_requests"] - row["num_refused"] > 1
    assert row["faults"] == {"not now": row["num_refused"]}
    assert count_wrong([turn]) == 0


def test_nothing_answered_gives_no_numbers_but_a_report():
    with FakeServer(fault="500") as server:
        turn = run_turn(target(server), POOL, mode="streamed", num_clients=1, seconds=None)
    [row] = summarize([turn])
    assert row["num_failed"] == 3
    assert (row["first_text_ms"], row["request_ms"]) == (None, None)
    assert idle_report(turn, [0.1] * 3)["most_beyond_block_ms"] is None
    json.dumps([row, idle_report(turn, [0.1] * 3)], allow_nan=False)


def test_idle_report_holds_first_text_against_the_block():
    with FakeServer() as server:
        settings = {"mode": "streamed", "num_clients": 1, "seconds": None}
        turn = run_turn(target(server), POOL, provisional=True, **settings)
    report = idle_report(turn, [0.0, 0.0, 10.0])
    assert report["outside_engine_ms"] == report["first_text_ms"]
    assert report["num_right"] == report["num_requests"] == 3
    slowest = max(answer.first_text for answer in turn.answers[:2])
    assert report["most_beyond_block_ms"] == pytest.approx(1000 * slowest)
    assert report["block_ms"]["p99"] == 10_000


def test_first_block_ends_before_the_answer():
    seen = []

    class Watched(Engine):
        def stream(self, request):
            seen.append(0)
            for output in super().stream(request):
                seen[-1] += 1
                yield output

    engine = Watched(tiny_model("llada"))
    policy = DecodingPolicy(block_size=4)
    requests = [
        Request(prompt_ids=[1], max_new_tokens=length, eos_token_id=(), policy=policy)
        for length in (4, 40)
    ]
    assert len(first_block_seconds(engine, requests)) == 2
    results = engine.generate(requests)
    assert seen[0] == seen[1] <= results[0].num_forwards
    assert seen[2] < results[1].num_forwards / 2


def test_modes_take_turns():
    assert [mode for mode, _ in plan_turns("both", 90)] == ["streamed", "plain"] * 3
    assert sum(seconds for _, seconds in plan_turns("both", 50)) == pytest.approx(50)
    with pytest.raises(ConfigError, match="--mode is 'bth'"):
        run_load(None, POOL, mode="bth", num_clients=1, seconds=1)


def test_a_key_is_sent_everywhere():
    with FakeServer(key="secret") as server:
        assert target(server, api_key="secret").model == "fake"
        with pytest.raises(D2FError, match="status 401; give its key with --api-key"):
            target(server)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "file:///etc", "http://", "http://x/v1"])
def test_a_url_that_is_no_server_s_is_refused(url):
    with pytest.raises(ConfigError, match="it must be like"):
        Target.find(url, max_tokens=1)


def test_a_server_that_is_not_there_is_said_to_be():
    with pytest.raises(D2FError, match="cannot be reached"):
        fetch("http://127.0.0.1:9")


def test_a_server_that_does_not_start_says_why(monkeypatch):
    monkeypatch.setattr(measured, "START_SECONDS", 20.0)
    with pytest.raises(D2FError, match=r"did not start: .*"):
        ServerProcess(["--no-such-option"])
