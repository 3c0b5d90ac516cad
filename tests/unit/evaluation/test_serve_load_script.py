"""`benchmarks/serve_load.py` from end to end, against a server that tests can make wrong."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from benchmarks.load import answers
from benchmarks.load.answers import Pool, make_pool
from tests.unit.evaluation.fake_server import POOL, FakeServer

from d2f.engine.generate import generate_ids
from d2f.models.checkpoint import load_model
from d2f.shipped import shipped_model
from d2f.text import Tokenizer

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "serve_load.py"
LOAD = ("--clients", "3", "--seconds", "0.3", "--max-tokens", "16", "--device", "cpu")


@pytest.fixture
def script(monkeypatch):
    """The script, with a pool that needs no model."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("serve_load", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pool = Pool(busy=POOL, idle=POOL, block_seconds=[0.01] * len(POOL))
    monkeypatch.setattr(module, "make_pool", lambda *_: pool)
    return module


def test_a_right_server_is_reported(script, tmp_path, capsys):
    file = tmp_path / "load.json"
    with FakeServer(key="secret") as server:
        script.main([*LOAD, "--url", server.url, "--api-key", "secret", "--json", str(file)])
    report = json.loads(file.read_text())
    assert report["environment"]["dtype"] == "float32"
    assert report["settings"]["clients"] == 3
    assert report["idle"]["num_right"] == len(POOL)
    assert [row["name"] for row in report["rows"]] == ["streamed", "plain"]
    for row in report["rows"]:
        assert row["num_right"] == row["num_requests"] > 0
    assert report["resident_mb"] == {"before": 500.0, "after": 500.0}
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert any("CPU ms/token, engine" in line and line.count("4.000") == 2 for line in lines)
    assert any("share of the engine's" in line and line.count("25.0%") == 2 for line in lines)
    assert "first text after" in out
    assert max(map(len, lines[: lines.index("", 3)])) < 80


def test_wrong_answers_fail_the_script(script, tmp_path, capsys):
    file = tmp_path / "load.json"
    with FakeServer(fault="mix", every=3) as server, pytest.raises(SystemExit) as stop:
        script.main([*LOAD, "--url", server.url, "--mode", "plain", "--json", str(file)])
    assert stop.value.code == 1
    [row] = json.loads(file.read_text())["rows"]
    assert row["num_mixed"] > 0
    before = 2 * len(POOL)
    wrong = row["num_mixed"] + before // 3
    assert f"{wrong} of {row['num_requests'] + before} answers are not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--url", "localhost"), 2, "it must be like http://127.0.0.1:8000"),
        (("--api-key", "x"), 2, "--api-key is for the server of --url"),
        (("--url", "http://127.0.0.1:9"), 1, "cannot be reached"),
        (("--json", "/no/such/folder/x.json"), 1, "cannot write"),
        (("--clients", "0"), 2, "--clients: 0 must be at least 1"),
        (("--seconds", "nan"), 2, "--seconds: nan must be"),
        (("--mode", "fast"), 2, "--mode"),
        (("--device", "nowhere"), 2, "nowhere"),
    ],
)
def test_bad_input_is_refused(script, capsys, arguments, code, words):
    with pytest.raises(SystemExit) as stop:
        script.main([*LOAD, *arguments])
    assert stop.value.code == code
    assert words in " ".join(capsys.readouterr().err.split())


def test_the_pool_is_what_the_engine_answers(monkeypatch):
    monkeypatch.setattr(answers, "NUM_IDLE", 1)
    pool = make_pool(2, 24, "cpu", 1)
    assert (len(pool.idle), len(pool.busy), len(pool.block_seconds)) == (1, 2, 1)
    tokenizer = Tokenizer.load(shipped_model())
    model = load_model(shipped_model(), device="cpu", dtype="float32")
    for expected in [*pool.idle, *pool.busy]:
        result = generate_ids(model, tokenizer.encode(expected.prompt), max_new_tokens=24)
        assert expected.text == tokenizer.decode(result.token_ids)
        assert expected.num_tokens == len(result.token_ids)
        assert expected.finish_reason == ("stop" if result.finish_reason == "eos" else "length")
