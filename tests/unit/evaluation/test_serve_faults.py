"""`benchmarks/serve_faults.py` notices a server that does not hold."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import pytest
from benchmarks.load.server import Target
from tests.unit.evaluation.fake_server import POOL, FakeServer

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "serve_faults.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("serve_faults", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "NUM_KILLED", 5)
    monkeypatch.setattr(module, "NUM_BROKEN", 20)
    # What is no HTTP at all the stand-in's own library answers as it likes.
    by_hand = module.by_hand
    monkeypatch.setattr(module, "by_hand", lambda target: by_hand(target)[:9])
    monkeypatch.setattr(module, "NUM_CLIENTS", 3)
    monkeypatch.setattr(module, "LONGEST_SECONDS", 0.05)
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.1)
    return module


def target(server):
    return Target.find(server.url, max_tokens=4)


@pytest.mark.parametrize("free_pages", [8, 7])
def test_pages_that_stay_taken_are_noticed(script, free_pages):
    with FakeServer(delay=0.02, free_pages=free_pages) as server:
        killed, settled = asyncio.run(script.kill_clients(target(server), POOL))
    assert killed[0]
    assert settled[0] == (free_pages == 8)
    assert f"{free_pages} of 8 pages are free" in settled[1]


@pytest.mark.parametrize(
    ("refusal", "held"),
    [
        ((400, "{}"), True),
        ((500, "{}"), False),
        ((400, 'File "x.py"'), False),
        ((200, "{}"), False),
    ],
)
def test_broken_requests_must_be_refused_without_details(script, refusal, held):
    with FakeServer(refusal=refusal) as server:
        (good, words), *odd = asyncio.run(script.send_broken(target(server)))
    assert good == held
    assert words == f"20 broken requests: 20x {refusal[0]}"
    assert bool(odd) != held


@pytest.mark.parametrize(("fault", "held"), [(None, True), ("wrong", False)])
def test_wrong_answers_afterwards_are_noticed(script, fault, held):
    with FakeServer(fault=fault) as server:
        [check] = script.answers_still_right(target(server), POOL, "it")
    assert check[0] == held
