"""`benchmarks/train_8b.py`: which measures it runs, how they end, what its report says."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "benchmarks"
ENVIRONMENT = {
    "processor": "NVIDIA H100 80GB HBM3", "device": "cuda:0", "dtype": "bfloat16",
    "torch": "2.13", "time": "2026-11-22T10:00:00",
}  # fmt: skip


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("train_8b", FOLDER / "train_8b.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_8b", module)
    spec.loader.exec_module(module)
    return module


def make_options(output, **others):
    given = {"output": output, "tiny": False, "budget": float("inf"), "small_seconds": 10}
    return argparse.Namespace(**given | others)


def make_job(script, name, *code, **others):
    command = (sys.executable, "-c", "\n".join(code))
    return script.Job(name=name, parts=("x",), command=command, **{"seconds": 1} | others)


def training(**row):
    base = {
        "micro_batch": 4, "checkpointing": False, "fits": True, "milliseconds": 400.0,
        "tokens_per_second": 10_000.0, "flops": {"total": 182e12}, "peak_bytes": 60 * 2**30,
        "peak_bytes_of_each": [60 * 2**30], "loss_peak_bytes": 0.4e9,
        "utilisation": {"nominal": 0.46, "nominal_all_pairs": 0.47, "measured": 0.6},
        "phases_ms": dict.fromkeys(
            ("data", "teacher", "student", "loss", "backward", "optimizer"), 60.0
        ),
    }  # fmt: skip
    return {
        "environment": ENVIRONMENT,
        "model": {"name": "llada-8b"},
        "settings": {"lora": 32, "processes": 1, "compiled": True, "length": 1024},
        "rows": [base | row],
        "largest_micro_batch": [],
        "memory_limit_gib": 78.0,
        "repeat": None,
    }


def verdicts(folder):
    lines = (folder / "README.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| ")]
    return {row[1]: (row[2], row[5]) for row in cells if len(row) == 7}


def test_what_is_there_is_not_made_again(script, tmp_path, capsys):
    options = make_options(tmp_path)
    there = f"import pathlib; pathlib.Path({str(tmp_path / 'a.json')!r}).write_text('{{}}')"
    (tmp_path / "a.json").write_text('{"complete": false}')
    job = make_job(script, "a", there)
    script.run_jobs([job], options, gpus=1)
    script.run_jobs([job], options, gpus=1)
    said = capsys.readouterr().err
    assert "a: done" in said
    assert "a: there already" in said


def test_what_cannot_be_run_is_said(script, tmp_path, capsys):
    jobs = [
        make_job(script, "fails", "raise SystemExit('no luck')"),
        make_job(script, "two", gpus=2),
        make_job(script, "needy", needs="fails"),
        make_job(script, "long", seconds=100),
    ]
    script.run_jobs(jobs, make_options(tmp_path, budget=50), gpus=1)
    said = capsys.readouterr().err
    assert "fails: FAILED (1): no luck" in said
    assert "two: not run, it needs 2 GPUs and there are 1" in said
    assert "needy: not run, it needs fails" in said
    assert "long: not run, about 100 s do not fit" in said


def test_a_measure_that_takes_too_long_ends_with_its_children(script, tmp_path):
    pid = tmp_path / "pid"
    job = make_job(
        script, "slow",
        "import pathlib, subprocess, sys, time",
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])",
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))",
        "time.sleep(600)",
    )  # fmt: skip
    assert script.run_job(job, tmp_path, 2) == "ENDED, out of time"
    state = Path(f"/proc/{pid.read_text()}/stat")
    # It has been killed; when it is gone is up to the system. A zombie is.
    while state.exists() and state.read_text().split()[2] != "Z":
        time.sleep(0.01)


def test_all_parts_have_measures_and_tiny_ones_run_on_a_cpu(script, tmp_path):
    jobs = script.make_jobs(make_options(tmp_path))
    assert {part for job in jobs for part in job.parts} == set(script.PARTS)
    assert len({job.name for job in jobs}) == len(jobs)
    for job in script.make_jobs(make_options(tmp_path, tiny=True)):
        words = " ".join(job.command)
        if "bench train" in words:
            assert "--device cpu" in words
            assert "--memory-limit" not in words
            assert "--shape" not in words


def test_verdicts_of_a_report(script, tmp_path):
    repeat = {"num_steps": 100, "lr": 1e-4, "floor": 0.0, "losses": [1.0, 0.2]}
    one = training(micro_batch=1) | {"repeat": repeat | {"loss_at": {"1": 1.0, "100": 0.2}}}
    score = {"num_problems": 4, "rows": [{
        "name": "pipelined", "score": 0.5, "score_standard_error": 0.1, "tokens_per_forward": 9.0,
        "correct": "1100",
    }]}  # fmt: skip
    results = {
        "llada_1": one,
        "llada_4": training(checkpointing=True),
        "two_one": training(),
        "two_ddp": training(tokens_per_second=19_600.0),
        "two_fsdp": training(tokens_per_second=17_000.0),
        "small_score": score,
        "small_shipped": score,
    }
    for name, result in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    script.write_report(tmp_path)
    found = verdicts(tmp_path)
    assert found["llada: largest micro-batch without checkpointing"] == ("1", "bar met")
    assert found["llada: largest micro-batch with checkpointing"] == ("4", "bar met")
    assert found["llada: model FLOPs utilisation, best row"] == ("46.0%", "bar met")
    name = "llada: memory of the loss over its inputs at micro-batch 4, GB"
    assert found[name] == ("0.40", "aim met")
    name = "llada: loss on one batch after 100 steps / before, no NaN"
    assert found[name] == ("0.2", "bar met")
    assert found["two_ddp: tokens/s of two GPUs / of one, micro-batch 4"] == ("1.96", "aim met")
    assert found["two_fsdp: tokens/s of two GPUs / of one, micro-batch 4"] == ("1.70", "missed")
    assert found["dream: model FLOPs utilisation, best row"] == ("–", "not measured")
    assert found["small model: score - that of the shipped one"][1] == "bar met"
    text = (tmp_path / "README.md").read_text()
    assert "NVIDIA H100 80GB HBM3, bfloat16, torch 2.13, 2026-11-22" in text


def test_micro_batches_that_do_not_fit_are_in_the_report(script, tmp_path):
    result = training()
    row = {"micro_batch": 64, "checkpointing": False, "fits": False}
    result["rows"].append(row)
    (tmp_path / "llada_4.json").write_text(json.dumps(result))
    script.write_report(tmp_path)
    assert "| 64 | no | out of memory |" in (tmp_path / "README.md").read_text()


def test_a_result_that_cannot_be_read_stops_nothing(script, tmp_path, capsys):
    (tmp_path / "a.json").write_text("{")
    write = f"import pathlib; pathlib.Path({str(tmp_path)!r}, 'b.json').write_text('{{}}')"
    jobs = [make_job(script, "a", "pass"), make_job(script, "b", write)]
    script.run_jobs(jobs, make_options(tmp_path), gpus=1)
    said = capsys.readouterr().err
    assert "a: done" in said
    assert "no report: JSONDecodeError" in said
    assert "b: done" in said
