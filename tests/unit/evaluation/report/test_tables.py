"""Tables against numbers worked out by hand."""

import pytest
from tests.unit.evaluation.fake_results import (
    cells,
    compare,
    fake_summary,
    line_of,
    write_results,
)

from d2f.evaluation.report.curves import curve_table, score_curves, threshold_curve
from d2f.evaluation.report.methods import method_tables, varied_table
from d2f.evaluation.report.table import Column, Table


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return compare(write_results(tmp_path_factory.mktemp("results")))


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    comparison = compare(
        tmp_path_factory.mktemp("methods"),
        fake_summary("autoregressive", speed=(200, 190, 210), score="1110"),
        fake_summary("vanilla", speed=50, score="1100", tokens_per_forward=0.5,
                     query_tokens_per_forward=64),
        fake_summary("pipelined", speed=(800, 700, 850), score="1111", tokens_per_forward=8,
                     query_tokens_per_forward=24, policy={"block_size": 8},
                     grid={"where": "validation", "tried": 12, "chosen": {}}),
        fake_summary("serial", speed=None, score=None, simulated="random weights"),
    )  # fmt: skip
    return {table.name: table for table in method_tables(comparison)}


def test_methods_by_hand(methods):
    table = methods["methods"]
    assert [line["method"] for line in table.lines] == [
        "autoregressive", "vanilla", "serial", "pipelined",
    ]  # fmt: skip
    shown = cells(table, line_of(table, method="pipelined"))
    assert shown == {
        "label": "pipelined",
        "tokens_per_second": "800 (700–850)",
        "over_autoregressive": "4.00x",
        "over_vanilla": "16.0x",
        "seconds_per_problem": "0.0625",
        "latency_over_vanilla": "16.0x",
        "mean_tokens": "50.0",
        "score_text": "100.0 ± 0.0 (4)",
        # Gaps 0, 0, 0, 1, and 0, 0, 1, 1.
        "over_twin": "+25.0 [-24.0, +74.0] (4)",
        "difference": "+50.0 [-6.6, +106.6] (4)",
    }
    assert cells(table, line_of(table, method="vanilla"))["difference"] == "–"


def test_reasons_multiply_to_the_ratio(methods):
    line = line_of(methods["reasons"], method="pipelined")
    assert line["milliseconds_per_forward"] == 10
    assert line["computed_per_answered"] == 3
    assert line["forwards_per_problem"] == 50 / 8
    # 8 times the tokens per forward; 10 ms per forward against 5.
    assert line["made_of"] == "8.00 × 0.500"


def test_settings_and_simulation_are_told(methods):
    line = line_of(methods["settings"], method="pipelined")
    assert line["settings"] == "pipelined, block_size=8, max_new_tokens=64"
    assert line["grid"] == "12 settings, on validation"
    assert line["num_timed"] == "100 × 3"
    assert line_of(methods["methods"], method="serial")["label"] == "serial (simulated)"
    assert "serial (simulated): random weights." in methods["methods"].notes
    shown = cells(methods["methods"], line_of(methods["methods"], method="serial"))
    assert set(shown.values()) == {"serial (simulated)", "–"}


def test_other_batch_sizes_are_told(tmp_path):
    comparison = compare(tmp_path, fake_summary("vanilla", batch_size=4))
    [note] = [n for n in method_tables(comparison)[0].notes if "batch 4" in n]
    assert "Warning" in note


def test_rows_that_go_on_after_eos_are_told(tmp_path):
    rows = [fake_summary("vanilla", early_stop=False), fake_summary("pipelined", early_stop=True)]
    tables = method_tables(compare(tmp_path, *rows))
    [note] = [note for note in tables[0].notes if "EOS" in note]
    assert note == "EOS does not end a problem of vanilla; it does of all other rows."
    settings = [line["settings"] for line in tables[2].lines]
    assert settings == [
        "vanilla, max_new_tokens=64, no stop at EOS", "pipelined, max_new_tokens=64",
    ]  # fmt: skip


def test_no_methods_no_tables(tmp_path):
    comparison = compare(tmp_path, fake_summary("control", experiment="control"))
    assert method_tables(comparison) == []


def test_settings_varied_stand_beside_the_first(everything):
    table = varied_table(everything, "block-size")
    assert [line["block_size"] for line in table.lines] == [8, 16, 32, 64]
    shown = cells(table, table.lines[1])
    assert (shown["over_first"], shown["tokens_per_second"]) == ("1.43x", "1000 (980–1030)")
    assert shown["difference"].startswith("-1.0 [")
    assert cells(table, table.lines[0])["difference"] == "–"
    noise = varied_table(everything, "noise")
    assert [column.header for column in noise.columns[1:5]] == [
        "schedule", "activate threshold", "confidence threshold", "seed",
    ]  # fmt: skip
    assert len(noise.lines) == 27


def test_an_experiment_without_rows_has_no_table(tmp_path):
    assert varied_table(compare(tmp_path, fake_summary("vanilla")), "noise") is None


def test_a_level_measured_twice_is_one_of_the_curve(tmp_path):
    def row(name, level, add):
        labels = {"activate_threshold": level, "confidence_threshold": level, "add_threshold": add}
        return fake_summary(name, experiment="thresholds", labels=labels)

    rows = [row("a", 0.9, 0.1), row("b", 0.8, 0.1), row("c", 0.9, 0.8), row("d", 0.8, 0.8)]
    curve = threshold_curve(compare(tmp_path, *rows, row("e", 0.8, 0.8)))
    assert [row.name for row in curve] == ["a", "b"]


def test_curves_and_their_table(everything):
    curves = {curve.name: curve for curve in score_curves(everything)}
    d2f = curves["D2F, thresholds"]
    assert [row.setting("add_threshold") for row in d2f.rows] == [0.1, 0.1, 0.1]
    steps = curves["vanilla, fewer steps"]
    assert [row.name for row in steps.rows] == ["steps-8", "steps-16", "steps-32", "vanilla"]
    assert "vanilla" not in curves
    table = curve_table(everything)
    assert [line["row"] for line in table.lines[:3]] == [row.name for row in d2f.rows]


@pytest.mark.parametrize(("stops", "last"), [(True, "stopped"), (False, "vanilla")])
def test_curve_of_steps_ends_in_the_row_that_stops_like_it(tmp_path, stops, last):
    comparison = compare(
        tmp_path,
        fake_summary("vanilla", early_stop=False, speed=10),
        fake_summary("stopped", method="vanilla-eos-stop", early_stop=True, speed=20),
        fake_summary("half", method="vanilla-eos-stop", experiment="steps", speed=30,
                     early_stop=stops, options={"num_steps": 32}),
    )  # fmt: skip
    curves = {curve.name: [row.name for row in curve.rows] for curve in score_curves(comparison)}
    [line] = [rows for name, rows in curves.items() if name.endswith(", fewer steps")]
    assert line == ["half", last]


def test_full_number_of_steps_is_no_second_point(tmp_path):
    comparison = compare(
        tmp_path,
        fake_summary("vanilla"),
        fake_summary("all", method="vanilla", experiment="steps", options={"num_steps": 64}),
    )
    curves = {curve.name: [row.name for row in curve.rows] for curve in score_curves(comparison)}
    assert curves == {"vanilla, fewer steps": ["all"], "vanilla": ["vanilla"]}


def test_curves_of_the_same_label_stay_apart(tmp_path):
    comparison = compare(tmp_path, fake_summary("a", label="same"), fake_summary("b", label="same"))
    assert len({curve.name for curve in score_curves(comparison)}) == 2


def test_no_scores_no_curves(tmp_path):
    assert curve_table(compare(tmp_path, fake_summary("vanilla", score=None))) is None
    assert curve_table(compare(tmp_path, fake_summary("vanilla", score=0.0))) is None


def test_markdown_is_padded_and_escaped():
    columns = [Column(key="a", header="name", is_number=False), Column(key="b", header="n")]
    table = Table(name="t", title="T", columns=columns, lines=[{"a": "x|y", "b": 10}, {"a": "z"}])
    assert table.markdown().splitlines() == [
        "| name |   n |",
        "| ---- | --: |",
        "| x\\|y |  10 |",
        "| z    |   – |",
    ]
