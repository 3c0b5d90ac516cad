"""`benchmarks/serve_load.py` with a real server: its answers are the engine's."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_load.py"
COMMAND = "--clients 6 --seconds 1 --num-prompts 6 --max-tokens 40 --device cpu --json"


def test_a_real_server_answers_as_the_engine_does(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    main = runpy.run_path(str(SCRIPT))["main"]
    monkeypatch.setattr("load.answers.NUM_IDLE", 2)
    main([*COMMAND.split(), str(tmp_path / "load.json")])
    report = json.loads((tmp_path / "load.json").read_text())
    assert report["settings"]["model"] == "d2f-student"
    assert report["idle"]["num_right"] == 2
    assert 0 < report["idle"]["outside_engine_ms"]["p99"] < report["idle"]["first_text_ms"]["p99"]
    assert report["resident_mb"]["after"] > 100
    for row in report["rows"]:
        assert row["num_right"] == row["num_requests"] >= 6
        assert row["tokens_per_forward"] > 1
        assert row["cpu"]["engine_ms_per_token"] > 0
