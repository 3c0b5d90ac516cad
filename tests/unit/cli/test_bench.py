"""`d2f bench step` and `d2f bench race` from end to end, at tiny sizes."""

from __future__ import annotations

import json

import pytest

from d2f.cli import bench_race, bench_step
from d2f.testing import write_checkpoint

STEP = ("bench", "step", "--device", "cpu", "--dtype", "float32", "--steps", 2)
RACE = ("bench", "race", "--device", "cpu", "--dtype", "float32", "--runs", 1)
SHAPE = ("--shape", "llada-8b", "--accept", 4, "--prompt-length", 6, "--max-new-tokens", 12)


pytestmark = pytest.mark.usefixtures("tiny_presets")


def test_step_reports_all_rows_and_ratios(d2f, tmp_path):
    file = tmp_path / "step.json"
    sizes = ("--batch", "1,2", "--window", "4,40", "--kv-length", "16,48", "--engine-tokens", 24)
    done = d2f(*STEP, "--shape", "llada-8b", *sizes, "--layers", 1, "--json", file)
    assert done.code == 0, done.err
    report = json.loads(file.read_text())
    assert report["environment"]["dtype"] == "float32"
    assert report["model"]["num_layers"] == 1
    assert report["model"]["random_weights"] is True
    assert report["rates"].keys() >= {"copy_bytes_per_second", "matmul_flops_per_second"}
    rows = [(r["strategy"], r["batch_size"], r["window"], r["kv_length"]) for r in report["steps"]]
    assert len(rows) == len(set(rows)) == 4 + 8
    for row in report["steps"]:
        assert row["num_steps"] == 2
        assert row["milliseconds"] > row["floor_ms"] > 0
    assert len(report["step_over_autoregressive"]) == 8
    assert len(report["added_time_over_reading_added_kv"]) == 2 + 4
    assert report["engine"]["window"] == 40
    assert 0 <= report["engine"]["idle_share"] < 1
    assert "llada-8b, 1 layer, random weights, float32" in done.out
    assert "x the autoregressive step" in done.out
    assert "x reading the added keys and values" in " ".join(done.out.split())
    assert "device idle" in done.out


@pytest.mark.parametrize("name", ["dream-7b", "qwen2.5-7b"])
def test_step_of_other_shapes(d2f, given_rates, name):
    done = d2f(*STEP, "--shape", name, "--kv-length", 16, "--engine-tokens", 0)
    assert done.code == 0, done.err
    assert "device idle" not in done.out
    assert ("pipelined" in done.out) == (name == "dream-7b")


def test_step_of_a_checkpoint(d2f, given_rates, tmp_path):
    folder = write_checkpoint(tmp_path / "model", "llada")
    done = d2f(*STEP, "--model", folder, "--window", 8, "--kv-length", 600, "--engine-tokens", 8)
    assert done.code == 0, done.err
    assert "its own weights" in done.out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--shape", "lada-8b"), 2, "did you mean 'llada-8b'"),
        (("--shape", "llada-8b", "--model", "x"), 2, "exclude each other"),
        (("--model", "x", "--layers", 2), 2, "only a --shape can be cut"),
        (("--shape", "qwen2.5-7b", "--window", 8), 2, "computes 1 token of a row"),
        (("--backend", "cuda"), 2, "unknown backend 'cuda'"),
        (("--json", "/no/such/folder/x.json"), 1, "cannot write"),
        (("--batch", "1,x"), 2, "no list of whole numbers"),
        (("--window", "0"), 2, "no list of whole numbers"),
        (("--layers", 0), 2, "--layers"),
    ],
)
def test_step_refuses_bad_input(d2f, arguments, code, words):
    done = d2f(*STEP, *arguments)
    assert done.code == code
    assert words in " ".join(done.err.replace("│", " ").split())


def test_race_of_a_shape_with_imposed_acceptance(d2f, tmp_path):
    file = tmp_path / "race.json"
    done = d2f(*RACE, *SHAPE, "--batch", "1,3", "--num-prompts", 2, "--json", file)
    assert done.code == 0, done.err
    report = json.loads(file.read_text())
    rows = {(row["batch_size"], row["name"]): row for row in report["rows"]}
    assert list(rows) == [(b, name) for b in (1, 3) for name in bench_race.STRATEGIES]
    assert rows[1, "pipelined"]["tokens_per_forward"] == 4
    assert rows[1, "autoregressive"]["tokens_per_forward"] == 1
    assert [rows[b, "serial"]["num_prompts"] for b in (1, 3)] == [2, 3]
    assert all(row["mean_tokens"] == 12 for row in rows.values())
    assert all(row["score"] is None for row in rows.values())
    assert report["settings"]["imposed_acceptance"] == [4]
    ratios = report["pipelined_over_autoregressive"]
    assert [line["batch_size"] for line in ratios["by_batch_size"]] == [1, 3]
    assert "imposed: 4 per forward" in done.out
    assert "Autoregression is faster" in done.out


def test_race_of_checkpoints_records_a_trace_for_shapes(d2f, tmp_path):
    models = [
        write_checkpoint(tmp_path / kind, kind, tokenizer=True, max_position_embeddings=4096)
        if kind == "qwen2"
        else write_checkpoint(tmp_path / kind, kind, tokenizer=True, max_sequence_length=4096)
        for kind in ("llada", "qwen2")
    ]
    trace = tmp_path / "trace.json"
    pair = ("--model", models[0], "--baseline", models[1])
    few = ("--num-prompts", 2, "--max-new-tokens", 10)
    done = d2f(*RACE, *pair, *few, "--record-trace", trace)
    assert done.code == 0, done.err
    counts = json.loads(trace.read_text())
    assert counts
    assert all(count >= 1 for count in counts)
    done = d2f(*RACE, *SHAPE[:2], "--trace", trace, "--num-prompts", 1, "--max-new-tokens", 9)
    assert done.code == 0, done.err
    assert f"imposed: {', '.join(map(str, counts))} per forward" in done.out


@pytest.mark.slow
def test_race_of_the_shipped_models(d2f, tmp_path):
    file = tmp_path / "race.json"
    done = d2f(*RACE, "--num-prompts", 2, "--json", file)
    assert done.code == 0, done.err
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["pipelined"]["tokens_per_forward"] >= 8
    assert rows["autoregressive"]["tokens_per_forward"] == 1
    assert all(0 <= row["score"] <= 1 for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--shape", "llada-8b"), 2, "--accept N or --trace FILE"),
        (("--accept", 4), 2, "are for a --shape"),
        ((*SHAPE, "--trace", "x"), 2, "exclude each other"),
        (("--shape", "qwen2.5-7b", "--accept", 4), 2, "qwen2.5-7b is autoregressive"),
        (("--model", "x"), 2, "--model and --baseline go together"),
        (("--layers", 2), 2, "only a --shape can be cut"),
        ((*SHAPE, "--max-new-tokens", 10_000), 1, "exceed the model's 512 positions"),
        ((*SHAPE, "--record-trace", "/no/such/folder/x.json"), 1, "cannot write"),
        (("--shape", "llada-8b", "--trace", "/no/such/file"), 1, "No such file"),
        (("--batch", "-1"), 2, "no list of whole numbers"),
    ],
)
def test_race_refuses_bad_input(d2f, arguments, code, words):
    done = d2f(*RACE, *arguments)
    assert done.code == code, done.err
    assert words in " ".join(done.err.replace("│", " ").split())


@pytest.mark.parametrize("text", ["3", "[]", "[1, 2.5]", "[true]", "[-1]", "[1"])
def test_a_trace_must_be_a_list_of_counts(d2f, tmp_path, text):
    file = tmp_path / "trace.json"
    file.write_text(text)
    done = d2f(*RACE, "--shape", "llada-8b", "--trace", file)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert str(file) in done.err


def test_tables_fit_in_80_columns():
    from rich.console import Console

    row = {
        "strategy": "autoregressive", "batch_size": 256, "window": 128, "kv_length": 16384,
        "milliseconds": 123.456, "weight_bytes": 15e9, "kv_bytes": 8e9, "product_flops": 1e12,
        "attention_flops": 1e11, "floor_ms": 5.0, "ratio_to_floor": 12.34,
        "share_of_matmul_rate": 1.0, "query_tokens_per_second": 250_000.0,
    }  # fmt: skip
    spread = {"median": 25_000.0}
    race = {
        "name": "autoregressive", "batch_size": 256, "tokens_per_second": spread,
        "decode_tokens_per_second": spread, "tokens_per_forward": 12.3, "mean_tokens": 128.0,
        "query_tokens_per_forward": 100.0, "milliseconds_per_step": 100.0, "step_ms_p99": 200.0,
        "score": 1.0,
    }  # fmt: skip
    for table in (bench_step._table([row]), bench_race._table([race])):
        console = Console(width=80, record=True, force_terminal=False)
        with console.capture() as captured:
            console.print(table)
        assert "…" not in captured.get()
