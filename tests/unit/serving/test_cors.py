"""Web pages of other origins: which a browser lets in, and what it lets them see."""

from __future__ import annotations

import pytest
from tests.unit.serving.live import live_server
from tests.unit.serving.running import served

from d2f.errors import ConfigError
from d2f.serving.settings import ServeSettings

PAGE, OTHER = "https://app.example", "https://evil.example"
PATH = "/v1/chat/completions"
ASKED = {"messages": [{"role": "user", "content": "1+1="}], "max_tokens": 3}


@pytest.fixture(scope="module")
def server():
    with live_server(
        served(), api_key="s3cret", cors_origins=(PAGE, "http://localhost:3000")
    ) as running:
        yield running


def preflight(server, origin, path=PATH, method="POST", names="authorization,x-stainless-lang"):
    return server.ask(
        "OPTIONS",
        path,
        Origin=origin,
        Access_Control_Request_Method=method,
        Access_Control_Request_Headers=names,
    )


@pytest.mark.parametrize("origin", [PAGE, "http://localhost:3000"])
@pytest.mark.parametrize(("path", "method"), [(PATH, "POST"), ("/v1/models", "GET")])
def test_a_browser_is_told_that_it_may(server, origin, path, method):
    told = preflight(server, origin, path, method)
    assert told.status == 200
    assert told.headers["access-control-allow-origin"] == origin
    assert method in told.headers["access-control-allow-methods"]
    allowed = told.headers["access-control-allow-headers"].lower()
    assert "authorization" in allowed
    assert "x-stainless-lang" in allowed
    assert "access-control-allow-credentials" not in told.headers


@pytest.mark.parametrize(
    "origin", [OTHER, "http://app.example", "https://app.example:8443", "null"]
)
def test_pages_of_other_origins_may_not(server, origin):
    assert preflight(server, origin).status == 400
    answer = server.post(ASKED, PATH, Origin=origin, Authorization="Bearer s3cret")
    for told in (preflight(server, origin), answer):
        assert "access-control-allow-origin" not in told.headers


def test_other_methods_are_not_allowed(server):
    assert preflight(server, PAGE, method="DELETE").status == 400


@pytest.mark.parametrize("stream", [False, True])
def test_answers_may_be_read(server, stream):
    key = "Bearer s3cret"
    answer = server.post(ASKED | {"stream": stream}, PATH, Origin=PAGE, Authorization=key)
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    seen = answer.headers["access-control-expose-headers"].lower()
    assert "x-request-id" in seen
    assert "retry-after" in seen


@pytest.mark.parametrize("key", ["", "Bearer wrong"])
def test_the_key_is_needed_and_the_refusal_may_be_read(server, key):
    answer = server.post(ASKED, PATH, Origin=PAGE, Authorization=key)
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    assert answer.headers["access-control-allow-origin"] == PAGE


def test_errors_may_be_read(server):
    answer = server.post({"zebra": 1}, PATH, Origin=PAGE, Authorization="Bearer s3cret")
    assert answer.status == 400
    assert answer.headers["access-control-allow-origin"] == PAGE


def test_without_the_option_no_page_is_let_in():
    with live_server(served()) as plain:
        answer = plain.post(ASKED, PATH, Origin=PAGE)
        assert preflight(plain, PAGE).status == 405
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_all_pages_where_it_is_asked_for_and_still_this_machines_names_only():
    with live_server(served(), cors_origins=("*",)) as everybody:
        assert preflight(everybody, OTHER).headers["access-control-allow-origin"] == "*"
        answer = everybody.post(ASKED, PATH, Origin=OTHER)
        assert answer.headers["access-control-allow-origin"] == "*"
        assert everybody.post(ASKED, PATH, Origin=OTHER, Host="d2f.evil.example").status == 403


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        ("app.example", "no origin of web pages"),
        ("localhost:3000", "no origin of web pages"),
        ("ftp://app.example", "no origin of web pages"),
        ("https://", "no origin of web pages"),
        ("https://app.example:x", "no origin of web pages"),
        ("", "no origin of web pages"),
        ("https://app.example/", "give https://app.example"),
        ("https://App.Example", "give https://app.example"),
        ("https://app.example:443", "give https://app.example"),
        ("http://app.example:80/path", "give http://app.example"),
        ("https://me:pw@app.example:8443", "give https://app.example:8443"),
        ("http://[::1]:3000/", r"give http://\[::1\]:3000"),
    ],
)
def test_what_no_browser_sends_is_refused_with_what_it_sends(origin, words):
    with pytest.raises(ConfigError, match=words):
        ServeSettings(cors_origins=(origin,))


@pytest.mark.parametrize("origin", ["*", "http://[::1]:3000", "http://127.0.0.1:5173", PAGE])
def test_origins(origin):
    assert ServeSettings(cors_origins=(origin,)).cors_origins == (origin,)
