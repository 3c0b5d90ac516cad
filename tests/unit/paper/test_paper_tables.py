"""The tables beside the paper against numbers worked out by hand."""

import pytest
from benchmarks.paper import ablations
from benchmarks.paper.aup import areas, curve_table_with_areas
from benchmarks.paper.methods import tables_beside_paper
from benchmarks.paper.published import ablation_counterpart, counterparts, load_paper
from benchmarks.paper.repeats import repeat_table
from tests.unit.evaluation.fake_results import (
    cells,
    compare,
    fake_summary,
    line_of,
    write_results,
)

from d2f.evaluation.report.curves import THRESHOLDS, score_curves


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return compare(write_results(tmp_path_factory.mktemp("results")))


@pytest.fixture
def methods(tmp_path):
    comparison = compare(
        tmp_path,
        fake_summary("autoregressive", speed=(200, 190, 210), score="1110"),
        fake_summary("vanilla", speed=50, score="1100", tokens_per_forward=0.5,
                     query_tokens_per_forward=64),
        fake_summary("pipelined", speed=(800, 700, 850), score="1111", tokens_per_forward=8,
                     query_tokens_per_forward=24, policy={"block_size": 8},
                     grid={"where": "validation", "tried": 12, "chosen": {}}),
        fake_summary("serial", speed=None, score=None, simulated="random weights"),
    )  # fmt: skip
    return {table.name: table for table in tables_beside_paper(comparison)}


def test_paper_stands_beside(methods):
    table = methods["paper"]
    line = line_of(table, method="pipelined")
    assert line["here_tps"] == 16
    assert line["LLaDA_tps"] == pytest.approx(52.5 / 7.2)
    assert line["Dream_latency"] == pytest.approx(26.8 / 2.8)
    assert line["Dream_score"] == pytest.approx(2.6)
    assert line["LLaDA_figure1"] is None
    assert "paper, A100, 8B: LLaDA, GSM8K-4-shot" in table.notes[0]
    autoregressive = cells(table, line_of(table, method="autoregressive"))
    assert autoregressive["LLaDA_tps"] == "–"
    assert autoregressive["LLaDA_figure1"] == "1.00x"


def test_thresholds(everything):
    table = ablations.threshold_table(everything)
    assert len(table.lines) == 12
    first, loose = table.lines[0], table.lines[-1]
    assert [first[key] for key in THRESHOLDS] == [0.95, 0.95, 0.95]
    assert first["over_base"] == first["paper_tps"] == 1
    assert [loose[key] for key in THRESHOLDS] == [0.85, 0.85, 0.1]
    assert loose["over_base"] == pytest.approx(1200 / (950 * 0.99))
    assert loose["paper_tps"] == pytest.approx(135.4 / 105.2)
    assert loose["paper_score"] == pytest.approx(75.0 - 76.9)
    assert loose["difference"].mean == pytest.approx(-3)


def test_noise_has_levels_of_both_thresholds(tmp_path):
    def row(schedule, confidence):
        labels = {"schedule": schedule, "seed": 1, "activate_threshold": 0.95}
        labels["confidence_threshold"] = confidence
        return fake_summary(f"{schedule}-{confidence}", experiment="noise", labels=labels)

    rows = [row(s, c) for s in ("monotone", "random") for c in (0.9, 0.98)]
    table = ablations.noise_table(compare(tmp_path, *rows))
    found = [(x["confidence_threshold"], x["schedule"], x.get("paper_tps")) for x in table.lines]
    gain = pytest.approx(119.9 / 114.5)
    assert found == [
        (0.98, "monotone", None), (0.98, "random", None), (0.9, "monotone", gain),
        (0.9, "random", 1.0),
    ]  # fmt: skip


def test_noise_over_seeds(everything):
    table = ablations.noise_table(everything)
    line = line_of(table, schedule="monotone", activate_threshold=0.95)
    # 1000 + 10, 20, 30 - 190; the standard deviation of 10, 20, 30 is 10.
    assert line["tokens_per_second"] == "830 ± 10.0"
    assert line["num_seeds"] == 3
    assert line["over_random"] == pytest.approx(830 / 710)
    assert line["score_gap"] == pytest.approx(2)
    assert line["paper_tps"] == pytest.approx(119.9 / 114.5)
    assert "paper_tps" not in line_of(table, schedule="ends-masked", activate_threshold=0.95)


def test_cache_and_control(everything):
    cache = ablations.cache_table(everything)
    assert [line["method"] for line in cache.lines] == [
        "vanilla", "vanilla-eos-stop", "serial", "pipelined",
    ]  # fmt: skip
    line = line_of(cache, method="serial")
    assert line["over_vanilla"] == 5.25
    assert line["Dream_tps"] == pytest.approx(40.7 / 9.5)
    control = ablations.control_table(everything)
    assert [line["method"] for line in control.lines] == ["vanilla", "control"]
    line = line_of(control, method="control")
    assert line["over_vanilla"] == 78 / 80
    assert line["Dream_latency"] == pytest.approx(26.8 / 29.9)
    assert "LLaDA_tps" not in line


def test_control_has_its_own_teacher(tmp_path):
    comparison = compare(
        tmp_path,
        fake_summary("control", experiment="control", speed=50),
        fake_summary("teacher", method="vanilla", experiment="control", speed=100),
        fake_summary("vanilla", speed=10),
    )
    table = ablations.control_table(comparison)
    assert [line["row"] for line in table.lines] == ["teacher", "control"]
    assert table.lines[1]["over_vanilla"] == 0.5


def test_block_sizes(everything):
    table = ablations.block_size_table(everything)
    assert [line["block_size"] for line in table.lines] == [8, 16, 32, 64]


def test_batch_sizes_and_overtaking(everything):
    table = ablations.batch_table(everything)
    assert [line["batch_size"] for line in table.lines] == [1, 4, 16, 64, 256]
    assert [column.key for column in table.columns] == [
        "batch_size", "autoregressive", "serial", "pipelined", "serial_ratio", "pipelined_ratio",
    ]  # fmt: skip
    assert table.lines[1]["pipelined_ratio"] == pytest.approx(1000 / 300 * 4**-0.3)
    assert "overtakes serial from batch 4 on" in table.notes[0]
    assert "overtakes pipelined from batch 64 on" in table.notes[1]


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ([3, 2], "at none of these batch sizes; at batch 4 pipelined is 2.00x"),
        ([3, 0.5], "from batch 4 on"),
        ([0.5, 0.4], "from batch 1 on"),
        ([0.5, 1.5], "at none of these"),
        ([None, None], "no batch size in common"),
    ],
)
def test_overtaking_in_words(ratios, words):
    lines = [{"batch_size": 4**i, "pipelined_ratio": r} for i, r in enumerate(ratios)]
    assert words in ablations.overtaking("pipelined", lines)


def test_empty_experiments_have_no_tables(tmp_path):
    comparison = compare(tmp_path, fake_summary("vanilla"))
    for make in (ablations.threshold_table, ablations.noise_table, ablations.cache_table,
                 ablations.control_table):  # fmt: skip
        assert make(comparison) is None
    assert ablations.block_size_table(comparison) is None
    assert ablations.batch_table(comparison) is None


@pytest.mark.parametrize(("speed", "warned"), [(108, False), (140, True)])
def test_repeats_tell_how_far_speeds_lie_apart(tmp_path, speed, warned):
    policy = {"block_size": 8}
    comparison = compare(
        tmp_path,
        fake_summary("pipelined", policy=policy),
        fake_summary("b-8", method="pipelined", experiment="block-size", policy=policy,
                     speed=speed),
        fake_summary("b-4", method="pipelined", experiment="block-size",
                     policy={"block_size": 4}, speed=900),
        fake_summary("untimed", method="pipelined", experiment="control", policy=policy,
                     speed=None),
    )  # fmt: skip
    table = repeat_table(comparison)
    [line] = table.lines
    assert line["apart"] == pytest.approx(speed / 100)
    assert line["speeds"] == f"{speed} (block-size, b-8); 100 (methods, pipelined)"
    assert ("Warning" in table.notes[-1]) == warned


def test_nothing_measured_twice_has_no_table(tmp_path):
    twice_in_one = [fake_summary(name, experiment="noise") for name in "ab"]
    assert repeat_table(compare(tmp_path, *twice_in_one)) is None


def test_paper_is_complete():
    tables = [row.table for row in load_paper()]
    assert {name: tables.count(name) for name in sorted(set(tables))} == {
        "table1": 20, "table2": 20, "table3": 12, "table4": 12, "table5": 8, "table6": 8,
        "table7": 8, "figure1": 14, "figure2": 20,
    }  # fmt: skip
    assert all(row.tokens_per_second for row in load_paper())


def test_counterparts():
    both = counterparts("functions", "small models")
    assert [c.name for c in both] == ["LLaDA, MBPP-3-shot", "Dream, MBPP-3-shot"]
    assert [c.family for c in counterparts("mbpp", "D2F-LLaDA-8B")] == ["LLaDA"]
    assert counterparts("my-own", "LLaDA") == []
    assert ablation_counterpart("my-own") is None


def test_areas_under_the_curves(everything):
    found = areas(score_curves(everything))
    # One point: a rectangle.
    assert found["autoregressive"] == pytest.approx(94.5)
    # Vanilla's fewer steps lose more than five points, so only the full number counts.
    assert found["vanilla, fewer steps"] == pytest.approx(0.8 * 95)
    table = curve_table_with_areas(everything)
    assert [x["aup"] for x in table.lines if x["curve"] == "D2F, thresholds"] == [
        found["D2F, thresholds"], None, None,
    ]  # fmt: skip
