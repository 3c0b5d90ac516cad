"""`benchmarks/engine.py` at tiny sizes: its report names all bars."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from d2f.evaluation.rates import Rates
from d2f.models import presets
from d2f.testing import tiny_spec

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "engine.py"
ARGUMENTS = (
    "--device cpu --dtype float32 --steps 1 --kv 32 --long-kv 96 --batches 1 --prompts 1 --runs 1 "
    "--requests 3 --burst 2 --oracle 1"
)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "llada-8b", tiny_spec("llada"))
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("engine_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(script, monkeypatch):
    """The benchmark's sizes that no option sets, as small as a test can afford."""
    requests, field, gaps = script.mixed_requests, script.shape_field, script.engine_gaps
    rates = Rates(copy_bytes_per_second=1e9, matmul_flops_per_second=1e11, matmul_size=64)
    for name, stand_in in {
        "mixed_requests": lambda *given: requests(
            *given, prompt_lengths=(4, 40), new_tokens=(16, 40)
        ),
        "shape_field": lambda model, name, _, *given: field(model, name, (6, 16), *given),
        "engine_gaps": lambda model, sizes, _, *given: gaps(model, sizes, 16, *given),
        "measure_rates": lambda *_: rates,
    }.items():
        monkeypatch.setattr(script, name, stand_in)


def test_verdicts(script):
    def word(value, least=False):
        return script.verdict("x", value, 3, 5 if least else 1, least=least)["verdict"]

    assert [word(v) for v in (1, 2, 3, 4, None)] == [
        "aim met", "bar met", "bar met", "missed", "not measured",
    ]  # fmt: skip
    assert [word(v, least=True) for v in (5, 4, 2.9)] == ["aim met", "bar met", "missed"]


@pytest.mark.usefixtures("small")
def test_parts_join_in_one_report(script, monkeypatch, tmp_path, capsys):
    for parts in (["steps", "imposed"], ["race", "bursts"]):
        arguments = [*ARGUMENTS.split(), "--output", str(tmp_path), "--parts", *parts]
        monkeypatch.setattr(sys, "argv", ["engine.py", *arguments])
        script.main()
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    table = [line for line in text.splitlines() if line.endswith((" met |", "missed |"))]
    assert len(table) == 7 + 1 + 3
    assert "Imposed: 4 tokens per forward." in text
    steps = json.loads((tmp_path / "steps.json").read_text())
    assert len(steps["steps"]) == len(script.STEPS)
    bursts = json.loads((tmp_path / "bursts.json").read_text())
    assert bursts["float32"]["share_equal_to_fp32_oracle"] == 1
    assert [bursts[d]["num_finished"] for d in ("float32", "bfloat16")] == [3, 3]
