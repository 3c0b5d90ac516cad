"""`d2f bench train` from end to end, at tiny sizes."""

from __future__ import annotations

import json

import pytest
from tests.forked import run_group

from d2f.cli import bench_train
from d2f.cli.step_bench import StepBench
from d2f.testing import write_checkpoint
from d2f.training.trainer import PHASES

TRAIN = ("bench", "train", "--device", "cpu", "--dtype", "float32", "--steps", 1)
SHAPE = ("--shape", "llada-8b", "--length", 32, "--micro-batch", 1)


pytestmark = pytest.mark.usefixtures("tiny_presets")


def test_all_rows_are_reported(d2f, given_rates, tmp_path):
    file = tmp_path / "train.json"
    options = ("--micro-batch", "1,2", "--checkpointing", "both", "--repeat-batch", 3)
    shape = ("--shape", "dream-7b", "--length", 40, "--layers", 1, "--lora", 4, "--lr", 1e-2)
    done = d2f(*TRAIN, *shape, *options, "--json", file)
    assert done.code == 0, done.err
    report = json.loads(file.read_text())
    assert report["model"]["random_weights"] is True
    assert report["model"]["num_layers"] == 1
    assert report["complete"] is True
    assert report["model"]["num_trained_parameters"] > 0
    settings = report["settings"]
    assert settings["lora"] == 4
    assert settings["processes"] == 1
    rows = report["rows"]
    assert [(row["micro_batch"], row["checkpointing"]) for row in rows] == [
        (1, False), (2, False), (1, True), (2, True),
    ]  # fmt: skip
    for row in rows:
        assert row["fits"] is True
        assert row["tokens_per_second"] == pytest.approx(
            1000 * 40 * row["micro_batch"] / row["milliseconds"]
        )
        flops, share = row["flops"], row["utilisation"]
        assert flops["total"] == flops["teacher"] + flops["student"] + flops["backward"]
        assert flops["total"] < row["flops_all_pairs"]
        assert share["nominal"] is None
        rate = report["rates"]["matmul_flops_per_second"]
        assert share["measured"] == pytest.approx(
            1000 * flops["total"] / row["milliseconds"] / rate
        )
        assert tuple(row["phases_ms"]) == PHASES
        assert row["peak_bytes_of_each"] == [None]
    # Recomputation is no work that must be done.
    assert rows[0]["flops"] == rows[2]["flops"]
    repeat = report["repeat"]
    assert list(repeat["loss_at"]) == ["1", "3"]
    assert len(repeat["losses"]) == 3
    assert repeat["losses"][2] < repeat["losses"][0]
    assert "dream-7b, 1 layer, random weights, LoRA r=4" in done.out
    assert "One batch again and again (forward_kl, lr 0.01)" in done.out


def test_all_weights_of_a_checkpoint(d2f, given_rates, tmp_path):
    folder = write_checkpoint(tmp_path / "model", "llada")
    done = d2f(*TRAIN, "--model", folder, "--full", "--length", 32, "--micro-batch", 2)
    assert done.code == 0, done.err
    assert "its own weights, all weights, length 32" in done.out


def test_the_shipped_student_by_default(d2f, given_rates, tmp_path):
    file = tmp_path / "train.json"
    done = d2f(*TRAIN, "--length", 32, "--micro-batch", 1, "--json", file)
    assert done.code == 0, done.err
    report = json.loads(file.read_text())
    assert report["model"]["name"] == "shipped student"
    assert report["settings"]["lora"] is None
    assert report["settings"]["loss_memory"] == 2048
    assert report["settings"]["noise"]["high"] == 1.0
    assert report["repeat"] is None


def test_what_was_measured_survives_an_error(d2f, given_rates, tmp_path, monkeypatch):
    phases = StepBench.phases

    def failing(bench, *arguments):
        if bench.config.batch_size > 1:
            raise RuntimeError("the device is lost")
        return phases(bench, *arguments)

    monkeypatch.setattr(StepBench, "phases", failing)
    file = tmp_path / "train.json"
    done = d2f(*TRAIN, *SHAPE, "--micro-batch", "1,2", "--json", file)
    assert done.code == 1
    assert "the device is lost" in done.err
    report = json.loads(file.read_text())
    assert report["complete"] is False
    assert [row["micro_batch"] for row in report["rows"]] == [1]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--shape", "lada-8b"), 2, "did you mean 'llada-8b'"),
        (("--shape", "llada-8b", "--model", "x"), 2, "exclude each other"),
        (("--layers", 2), 2, "only a --shape can be cut"),
        ((*SHAPE, "--lora", 4, "--full"), 2, "--lora and --full exclude each other"),
        (("--shape", "qwen2.5-7b", "--length", 32), 2, "qwen2.5-7b is autoregressive"),
        ((*SHAPE, "--length", 4000), 2, "--length 4000: the model has 512 positions"),
        ((*SHAPE, "--checkpointing", "maybe"), 2, "must be no, yes or both"),
        ((*SHAPE, "--sharding", "half"), 2, "half"),
        ((*SHAPE, "--micro-batch", "1,max"), 2, "max is for a GPU"),
        ((*SHAPE, "--memory-limit", 80), 2, "--memory-limit is for a GPU"),
        ((*SHAPE, "--dtype", "float16"), 2, "float16"),
        ((*SHAPE, "--dropout", 1), 2, "dropout is 1"),
        ((*SHAPE, "--json", "/no/such/folder/x.json"), 1, "cannot write"),
        (("--micro-batch", "1,x"), 2, "no list of whole numbers"),
        (("--lora", 0), 2, "--lora"),
    ],
)
def test_bad_input_is_refused(d2f, given_rates, arguments, code, words):
    done = d2f(*TRAIN, *arguments)
    assert done.code == code, done.err
    assert words in " ".join(done.err.replace("│", " ").split())


def test_where_no_memory_is_left_the_row_says_so(d2f, given_rates, tmp_path, monkeypatch):
    time = StepBench.time

    def limited(bench, *arguments, **options):
        if bench.config.batch_size > 1:
            raise RuntimeError("CUDA error: out of memory")
        return time(bench, *arguments, **options)

    monkeypatch.setattr(StepBench, "time", limited)
    file = tmp_path / "train.json"
    done = d2f(*TRAIN, *SHAPE, "--micro-batch", "1,4", "--json", file)
    assert done.code == 0, done.err
    assert [row["fits"] for row in json.loads(file.read_text())["rows"]] == [True, False]
    assert "out of memory" in done.out


def test_tables_fit_in_80_columns():
    from rich.console import Console

    row = {
        "micro_batch": 128, "checkpointing": True, "fits": True, "milliseconds": 12345.6,
        "tokens_per_second": 125_000.0, "flops": {"total": 4.3e15}, "peak_bytes": 150e9,
        "loss_peak_bytes": 1e9, "utilisation": {"nominal": 0.5, "measured": 0.7},
        "phases_ms": dict.fromkeys(PHASES, 12345.6),
    }  # fmt: skip
    for table in (bench_train._costs_table([row]), bench_train._phases_table([row])):
        console = Console(width=80, record=True, force_terminal=False)
        with console.capture() as captured:
            console.print(table)
        assert "…" not in captured.get()


@pytest.mark.slow
def test_two_processes_measure_together(tmp_path):
    folder, file = write_checkpoint(tmp_path / "model", "Dream"), tmp_path / "train.json"
    done = run_group(
        2, "d2f", *TRAIN, "--model", folder, "--length", 32, "--micro-batch", 2, "--full",
        "--sharding", "full", "--json", file,
    )  # fmt: skip
    assert done.codes == [0, 0], "".join(done.errors)
    assert done.out.count("Numbers written") == 1
    report = json.loads(file.read_text())
    (row,) = report["rows"]
    assert report["settings"]["processes"] == 2
    assert len(row["peak_bytes_of_each"]) == 2
    # All processes' tokens, but the operations of one.
    assert row["tokens_per_second"] == pytest.approx(1000 * 2 * 2 * 32 / row["milliseconds"])
