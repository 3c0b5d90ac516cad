"""`d2f bench serve` with a real server: its answers are the engine's, its metrics say enough."""

from __future__ import annotations

import json
import sys

import pytest

from d2f.cli import bench_serve
from d2f.cli.main import main

COMMAND = (
    "d2f bench serve --clients 6 --seconds 1 --num-prompts 6 --max-tokens 40 --device cpu --json"
)


def test_a_real_server_answers_as_the_engine_does(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_serve, "NUM_IDLE", 2)
    monkeypatch.setattr(sys, "argv", [*COMMAND.split(), str(tmp_path / "load.json")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, capsys.readouterr().err
    report = json.loads((tmp_path / "load.json").read_text())
    assert report["settings"]["model"] == "d2f-student"
    assert report["idle"]["num_right"] == 2
    assert 0 < report["idle"]["outside_engine_ms"]["p99"] < report["idle"]["first_text_ms"]["p99"]
    assert report["resident_mb"]["after"] > 100
    for row in report["rows"]:
        assert row["num_right"] == row["num_requests"] >= 6
        assert row["tokens_per_forward"] > 1
        assert row["cpu"]["engine_ms_per_token"] > 0
