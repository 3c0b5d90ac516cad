"""Requests that nobody should send, and clients that go away."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import threading
import time

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from tests.unit.serving.live import events, live_server
from tests.unit.serving.running import Gate, Metrics, all_free, served

from d2f.errors import ConfigError
from d2f.serving.app import create_app
from d2f.serving.server import open_socket, run_server
from d2f.serving.service import Service, ServiceState
from d2f.serving.settings import ServeSettings

LIMIT = 4096
CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance,
    response_schema_conformance, negative_data_rejection, unsupported_method,
]  # fmt: skip


@pytest.fixture(scope="module")
def server():
    with live_server(
        served(), max_body_bytes=LIMIT, body_timeout=0.3, default_max_tokens=8, max_choices=4
    ) as running:
        yield running


@pytest.fixture(scope="module")
def guarded():
    with live_server(served(), api_key="s3cret") as running:
        yield running


def head(length, path="/v1/completions", **headers):
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join([*lines, f"Content-Length: {length}"]) + "\r\n\r\n").encode()


def status_of(raw):
    """Of a raw answer that must be an error in OpenAI's format."""
    start, _, body = raw.partition(b"\r\n\r\n")
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    return int(start.split()[1])


def alive(server):
    return server.post({"prompt": "a", "max_tokens": 2}).status == 200


def eventually(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ------------------------------------------------------------------------------------ bodies


@pytest.mark.parametrize("size", [LIMIT + 1, 4 * LIMIT, 40 * LIMIT])
def test_a_body_that_is_too_long(server, size):
    assert server.post(b" " * size).status == 413


def test_a_chunked_body_that_is_too_long(server):
    start = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    chunks = b"".join(b"400\r\n" + b" " * 1024 + b"\r\n" for _ in range(8))
    assert status_of(server.send(start + chunks + b"0\r\n\r\n")) == 413


def test_a_body_of_the_limit_is_read(server):
    body = json.dumps({"prompt": "a", "max_tokens": 2}).encode()
    assert server.post(body + b" " * (LIMIT - len(body))).status == 200


def test_a_body_that_does_not_come(server):
    assert status_of(server.send(head(100) + b'{"prompt"')) == 408


def test_a_body_that_ends_too_early(server):
    server.send(head(100) + b'{"prompt"', half_close=True)
    assert alive(server)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"]
)
def test_other_content_types(server, kind):
    assert server.post(b'{"prompt": "a"}', Content_Type=kind).status == 415


def test_a_charset_and_capitals_are_fine(server):
    body = b'{"prompt": "a", "max_tokens": 2}'
    assert server.post(body, Content_Type="Application/JSON; charset=utf-8").status == 200


def test_compressed_bodies(server):
    assert server.post(b"\x1f\x8b", Content_Encoding="gzip").status == 415


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b"{", b'{"prompt": "a",}', b"\xff\xfe", b"[" * 4000, b"1" * 4000,
        b'{"prompt": NaN}', b'{"prompt": "a", "temperature": 1e999}', b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "n": 1e400}', b'{"prompt": "a", "seed": 99999999999999999999}',
        b'{"messages": [{"role": "user", "content": "\\udc00"}]}', b'{"\\ud800": 1}',
        b'{"messages": "a", "prompt": {}}', b'{"prompt": "a", "stop": ["\\ud800"]}',
        b'{"prompt": "a", "policy": []}', b'{"prompt": "a", "options": {"__class__": "x"}}',
        b'{"prompt": [-1]}', b'{"prompt": [[[]]]}', b'{"prompt": "a", "model": {}}',
        b'{"prompt": "a", "model": "../../etc/passwd"}', b'{"prompt": "a", "strategy": ""}',
    ],
)  # fmt: skip
def test_malformed_bodies(server, path, body):
    answer = server.post(body, path)
    assert 400 <= answer.status < 500
    assert answer.error["message"]
    assert "Traceback" not in answer.body.decode()
    assert ".py" not in answer.body.decode()


def test_as_deep_as_can_be_read(guarded):
    # Somewhere near the limit one can read a body but not write it.
    for depth in range(900, 1000):
        nested = b"[" * depth + b"]" * depth
        body = b'{"user": "\\u0041", "prompt": ' + nested + b"}"
        answer = guarded.post(body, Authorization="Bearer s3cret")
        assert (answer.status, answer.error["message"] != "") == (400, True)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["a", "b"], "n": 10**4299},
        {"prompt": "a", "strategy": "vanilla", "options": {"num_steps": 10**4299}},
        {"prompt": "a", "model": "m" * 500_000},
        {"prompt": "a", "strategy": "s" * 500_000},
        {"prompt": "a", "k" * 500_000: 1},
        {"prompt": "a", "options": {"k" * 500_000: 1}},
    ],
    ids=["n", "option", "model", "strategy", "name", "option's name"],
)
def test_an_answer_does_not_grow_with_what_it_refuses(guarded, body):
    answer = guarded.post(body, Authorization="Bearer s3cret")
    assert answer.status in (400, 404)
    assert len(answer.body) < 3000


def test_nul_and_odd_characters_are_text(server):
    for prompt in ("\0", "\u202e", "\U0010ffff", "\x7f", "é~"):
        assert server.post({"prompt": prompt, "max_tokens": 2}).status == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
FIELDS = st.sampled_from(
    ["model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n",
     "logprobs", "policy", "options", "strategy", "stream_options", "early_stop", "messages"]
)  # fmt: skip


@settings(
    max_examples=100,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
@given(st.dictionaries(FIELDS, JSON, max_size=3))
def test_any_values_are_answered(server, value):
    body = {"prompt": "a", "max_tokens": 1} | value
    try:
        content = json.dumps(body).encode()
    except UnicodeEncodeError:
        return
    answer = server.post(content)
    assert answer.status == 200 or 400 <= answer.status < 500


def test_requests_from_its_own_document(server):
    document = server.ask("GET", "/openapi.json").json
    schema = schemathesis.openapi.from_dict(document)
    # Half of them are wrong on purpose.
    every = st.one_of(
        [
            operation.ok().as_strategy(generation_mode=mode)
            for operation in schema.get_all_operations()
            for mode in schemathesis.GenerationMode
            if operation.ok().path.startswith("/v1/") and operation.ok().method == "post"
        ]
    )

    @settings(
        max_examples=40,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(every)
    def ask(case):
        answer = case.call(base_url=server.url, timeout=30)
        # What is too long is refused unread, be it right or wrong.
        if answer.status_code != 413:
            case.validate_response(answer, checks=CHECKS)

    ask()
    assert alive(server)


# ------------------------------------------------------------------------------------- access


@pytest.mark.parametrize(
    "key", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic s3cret", "s3cret", "Bearer é"]
)
def test_a_wrong_key(guarded, key):
    headers = {} if key is None else {"Authorization": key}
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing", "/pagex", "/healthz"):
        answer = guarded.ask("GET", path, **headers)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert guarded.post(b"{}", **headers).status == 401


def test_the_right_key_and_what_needs_none(guarded):
    assert guarded.ask("GET", "/v1/models", Authorization="Bearer s3cret").status == 200
    assert guarded.ask("GET", "/v1/models", Authorization="bearer s3cret").status == 200
    for path in ("/health", "/health/live", "/health/ready", "/"):
        assert guarded.ask("GET", path).status == 200
    # Whoever has the key may come under any name.
    named = guarded.ask("GET", "/v1/models", Authorization="Bearer s3cret", Host="d2f.example")
    assert named.status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil", ""]
)
def test_other_names_need_a_key(server, host):
    for path in ("/v1/models", "/", "/health"):
        assert server.ask("GET", path, Host=host).status == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"])
def test_loopback_names(server, host):
    assert server.ask("GET", "/v1/models", Host=host).status == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/", 405),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/models/none", 404),
        ("GET", "/docs", 404),
        ("GET", "/%00", 404),
        ("GET", "//v1//models", 404),
        ("BREW", "/v1/nothing", 404),
    ],
)
def test_routes_that_are_not_there(server, method, path, status):
    answer = server.ask(method, path)
    assert answer.status == status
    assert answer.error["message"]
    assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/openapi.json"])
def test_heads(server, path):
    answer = server.ask("HEAD", path)
    assert (answer.status, answer.body) == (200, b"")


def test_what_is_no_http(server):
    for data in (b"\0" * 100, b"GET\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"A" * 100_000):
        with contextlib.suppress(ConnectionError):  # the server may hang up before all is read
            server.send(data, half_close=True)
    assert alive(server)


# -------------------------------------------------------------------- clients that go or wait


def test_clients_that_leave_free_their_pages(server):
    rng = random.Random(0)

    def leave(number):
        body = {"prompt": "a" * rng.randrange(1, 60), "max_tokens": 100, "n": rng.choice([1, 3])}
        body |= {"stream": rng.random() < 0.5, "policy": {"confidence_threshold": 1.0}}
        content = json.dumps(body).encode()
        data = head(len(content)) + content
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            cut = len(data) if rng.random() < 0.8 else rng.randrange(len(data))
            connection.sendall(data[:cut])
            time.sleep(rng.random() * 0.1)
            if rng.random() < 0.5:
                # What was sent is thrown away: the connection is reset.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    for _ in range(10):
        threads = [threading.Thread(target=leave, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    model = next(iter(server.service.models.values()))
    eventually(lambda: all_free(model))
    assert alive(server)


def test_a_full_queue_says_when_to_come_again():
    model = served(max_batch_size=1)
    with live_server(model, max_waiting=1) as server:
        gate = Gate(model.engine)
        body = {"prompt": "a", "max_tokens": 24, "policy": {"confidence_threshold": 1.0}}
        asked = [threading.Thread(target=server.post, args=(body,)) for _ in range(2)]
        asked[0].start()
        gate.let(1)
        eventually(lambda: model.engine.status().num_running == 1)
        # It waits until its first step has ended, and must not be taken for the second.
        eventually(lambda: server.service.num_waiting == 0)
        asked[1].start()
        eventually(lambda: server.service.num_waiting == 1)
        refused = server.post({"prompt": "a", "max_tokens": 2, "stream": True})
        gate.open()
        for thread in asked:
            thread.join()
    assert (refused.status, refused.error["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long(stream):
    model = served()
    with live_server(model, request_timeout=0.3) as server:
        gate = Gate(model.engine)
        answer = server.post({"prompt": "a", "max_tokens": 2, "stream": stream})
        gate.open()
        if stream:
            error = json.loads(answer.body.decode().removeprefix("data: "))["error"]
        else:
            assert answer.status == 504
            error = answer.error
        assert error["code"] == "timeout"
        eventually(lambda: all_free(model))


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_breaks_is_told_and_nothing_hangs(stream, caplog):
    model = served()
    with live_server(model) as server:
        step, left = model.engine.step, [2]

        def broken():
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("/secret/path: no such kernel")
            return step()

        model.engine.step = broken
        body = {"prompt": "a", "max_tokens": 64, "stream": stream}
        body["policy"] = {"confidence_threshold": 1.0}
        answer = server.post(body)
        assert b"/secret" not in answer.body
        if stream:
            last = answer.body.decode().strip().split("\n\n")[-1]
            error = json.loads(last.removeprefix("data: "))["error"]
        else:
            assert answer.status == 503
            error = answer.error
        assert error["code"] == "unavailable"
        health = server.ask("GET", "/health")
        assert (health.status, health.json["status"]) == (503, "failed")
        assert b"/secret" not in health.body
        assert server.post(body).status == 503
        assert server.ask("GET", "/health/live").status == 200


def test_running_requests_end_before_the_server():
    model = served()
    answers = []
    with live_server(model) as server:
        server.server._drain_seconds = 20
        gate = Gate(model.engine)
        asked = threading.Thread(
            target=lambda: answers.append(
                server.post({"prompt": "a", "max_tokens": 24, "stream": True})
            )
        )
        asked.start()
        gate.let(1)
        eventually(lambda: model.engine.status().num_running == 1)
        server.server._loop.call_soon_threadsafe(server.server.drain)
        eventually(lambda: server.ask("GET", "/health").json["status"] == "draining")
        assert server.post({"prompt": "a"}).status == 503
        gate.open()
        asked.join(20)
    assert sum(len(chunk["choices"][0]["text"]) for chunk in events(answers[0].body)) == 24


def test_told_twice_it_does_not_wait_for_requests():
    model = served()
    answers = []
    with live_server(model) as server:
        server.server._drain_seconds = 1000
        body = {"prompt": "a", "max_tokens": 400, "policy": {"confidence_threshold": 1.0}}
        gate = Gate(model.engine)
        asked = threading.Thread(target=lambda: answers.append(server.post(body)))
        asked.start()
        gate.let(1)
        eventually(lambda: model.engine.status().num_running == 1)
        for _ in range(2):
            server.server.handle_exit(signal.SIGTERM, None)
        # It may have stopped already: the second signal ends it after any step.
        eventually(lambda: server.service.state is not ServiceState.READY)

        def stepped_to_its_end():
            gate.let(1)
            return not asked.is_alive()

        eventually(stepped_to_its_end)
    assert answers[0].status == 503


def test_an_error_nobody_expected_has_an_id_and_no_words(server, monkeypatch, caplog):
    async def fail(*_, **__):
        raise KeyError("/secret/path")

    monkeypatch.setattr(server.service, "submit", fail)
    answer = server.post({"prompt": "a"})
    assert (answer.status, answer.error["type"]) == (500, "server_error")
    assert answer.headers["x-request-id"] in answer.error["message"]
    assert b"secret" not in answer.body
    assert any(answer.headers["x-request-id"] in record.getMessage() for record in caplog.records)


def test_engines_that_cannot_be_made_ready_end_the_server():
    model = served(kv_cache_bytes=1)
    chosen, metrics = ServeSettings(port=0), Metrics()
    service = Service([model], metrics=metrics)
    with open_socket("127.0.0.1", 0) as bound, pytest.raises(ConfigError, match="cache"):
        run_server(create_app(service, chosen, metrics), service, chosen, bound, pytest.fail)
    assert service.state is ServiceState.STOPPED


def test_a_client_that_does_not_read_is_given_up():
    model = served()
    with live_server(model, request_timeout=0.5) as server:
        body = {"prompt": "a", "max_tokens": 500, "n": 64, "stream": True}
        body |= {"stream_options": {"include_provisional": True}, "strategy": "serial"}
        content = json.dumps(body).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(head(len(content)) + content)
            eventually(lambda: model.engine.status().num_running > 0)
            eventually(lambda: all_free(model))
        assert alive(server)
