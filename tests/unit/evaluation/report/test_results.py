"""Result files, good and bad."""

import json

import pytest
from benchmarks.paper.claims import small_sample
from tests.unit.evaluation.fake_results import fake_summary, write_row

from d2f.errors import ConfigError
from d2f.evaluation.report.reading import load_results
from d2f.evaluation.report.rows import paired_difference
from d2f.evaluation.report.table import conditions


def load_one(folder):
    [comparison] = load_results([folder]).comparisons
    return comparison


def test_rows_are_found_at_any_depth_and_ordered_as_in_the_paper(tmp_path):
    for name in ("pipelined", "my-own", "vanilla", "autoregressive"):
        write_row(tmp_path / "deep" / "deeper", fake_summary(name))
    rows = load_one(tmp_path).of("methods")
    assert [row.method for row in rows] == ["autoregressive", "vanilla", "pipelined", "my-own"]


def test_numbers_of_a_row(tmp_path):
    summary = fake_summary("serial", speed=(50, 40, 60), score="1101", tokens_per_forward=2.0)
    write_row(tmp_path, summary | {"simulated": "random weights", "policy": {"block_size": 8}})
    [row] = load_one(tmp_path).rows
    assert row.tokens_per_second == (50, 40, 60)
    assert row.seconds_per_problem.median == 1
    assert row.score == 75
    assert row.standard_error == pytest.approx(100 * (0.75 * 0.25 / 4) ** 0.5)
    assert row.label == "serial (simulated)"
    assert row.setting("block_size") == 8
    assert row.setting("no such") is None
    assert row.problem_ids == ("0", "1", "2", "3")


def test_same_folder_twice_counts_once(tmp_path):
    write_row(tmp_path, fake_summary("serial"))
    results = load_results([tmp_path, tmp_path / "serial"])
    assert len(results.rows) == 1
    assert results.warnings == ()


def test_newer_of_two_measurements_is_kept(tmp_path):
    old = fake_summary("serial", speed=1.0)
    write_row(tmp_path / "a", fake_summary("serial", speed=2.0) | {
        "environment": old["environment"] | {"time": "2001-01-01"}
    })  # fmt: skip
    write_row(tmp_path / "b", old)
    results = load_results([tmp_path])
    assert [row.tokens_per_second.median for row in results.rows] == [2.0]
    [warning] = results.warnings
    assert "measured twice" in warning


def test_machines_that_repeat_each_other_are_compared_apart(tmp_path):
    for processor in ("CPU", "GPU"):
        for name in ("vanilla", "serial"):
            summary = fake_summary(name)
            summary["environment"] = summary["environment"] | {"processor": processor}
            write_row(tmp_path / processor, summary)
    found = load_results([tmp_path]).comparisons
    assert [c.machine for c in found] == ["CPU", "GPU"]
    assert [len(c.rows) for c in found] == [2, 2]
    assert found[1].title == "fake family on fake problems (GPU)"


def test_rows_of_different_conditions_are_told(tmp_path):
    for name, processor, dtype in (("vanilla", "CPU", "float32"), ("serial", "GPU", "bfloat16")):
        summary = fake_summary(name)
        summary["environment"] = summary["environment"] | {"processor": processor, "dtype": dtype}
        write_row(tmp_path, summary)
    warnings = conditions(load_one(tmp_path).of("methods"))
    assert warnings == [
        "**Warning: rows differ in processor:** CPU (vanilla); GPU (serial)",
        "**Warning: rows differ in dtype:** float32 (vanilla); bfloat16 (serial)",
    ]


def test_unfinished_rows_are_named(tmp_path):
    write_row(tmp_path, fake_summary("serial"))
    half = write_row(tmp_path, fake_summary("pipelined"))
    (half / "summary.json").unlink()
    recipe = {"score": {}, "speed": {}, "rows": [{"name": "vanilla", "score": False}]}
    write_row(tmp_path, fake_summary("vanilla", speed=None, score=None, recipe=recipe))
    warnings = load_results([tmp_path]).warnings
    assert warnings == (
        f"not finished and left out: {half}",
        f"not finished, has no speed yet: {tmp_path / 'vanilla'}",
    )


def test_nothing_finished(tmp_path):
    (write_row(tmp_path, fake_summary("serial")) / "summary.json").unlink()
    with pytest.raises(ConfigError, match=r"no results .*not finished: .*serial"):
        load_results([tmp_path])


@pytest.mark.parametrize(
    ("folder", "words"), [("nowhere", "is not a folder"), ("", "has no results")]
)
def test_folder_without_results(tmp_path, folder, words):
    with pytest.raises(ConfigError, match=words):
        load_results([tmp_path / folder])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "has format 2, and this d2f reads 1"),
        ({"family": None}, "'family' is no text"),
        ({"labels": [1]}, "'labels' is no table"),
        ({"labels": {"add_threshold": "low"}}, "labels.add_threshold is no number"),
        ({"score": 3}, "'score' is no table"),
        ({"score": {"num_problems": "many"}}, "num_problems is no whole number"),
        ({"score": {"num_problems": 1, "score": "x"}}, "score.score is no number"),
        ({"score": {"num_problems": 2, "correct": "1"}}, "has 1 digit for 2 problems"),
        ({"score": {"num_problems": 2, "correct": "1x"}}, "digits 0 and 1"),
        ({"speed": {"tokens_per_second": 7}}, "no median, lowest and highest"),
    ],
)
def test_broken_summary_is_named(tmp_path, change, words):
    path = write_row(tmp_path, fake_summary("serial") | change, problems=False) / "summary.json"
    with pytest.raises(ConfigError, match=words) as caught:
        load_results([tmp_path])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"), [("{", "cannot be read as JSON"), ("[]", "no summary"), ("{}", "no format")]
)
def test_file_that_is_no_summary(tmp_path, text, words):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_results([tmp_path])


def test_numbers_that_are_missing_are_missing(tmp_path):
    """Where nothing was answered, result files hold null."""
    summary = fake_summary("serial")
    summary["speed"] |= {"tokens_per_second": dict.fromkeys(("median", "lowest", "highest"))}
    summary["score"] |= {"num_problems": 0, "correct": "", "score": None, "standard_error": None}
    write_row(tmp_path, summary)
    [row] = load_one(tmp_path).rows
    assert (row.tokens_per_second, row.score, row.num_scored) == (None, None, 0)


def pair(folder, one, other, **options):
    write_row(folder, fake_summary("pipelined", score=one), **options)
    write_row(folder, fake_summary("vanilla", score=other), **options)
    comparison = load_one(folder)
    return comparison.find("pipelined"), comparison.find("vanilla")


def test_paired_difference_by_hand(tmp_path):
    found = paired_difference(*pair(tmp_path, "1101", "1000"))
    # Gaps 0, 1, 0, 1: mean 1/2, variance 1/3, standard error sqrt(1/12).
    reach = 196 * (1 / 12) ** 0.5
    assert found == pytest.approx((50, 50 - reach, 50 + reach, 4))


def test_answers_that_do_not_differ_leave_a_doubt(tmp_path):
    assert paired_difference(*pair(tmp_path, "1101", "1101")) == (0, -75, 75, 4)


def test_pairs_are_the_first_problems_of_both(tmp_path):
    found = paired_difference(*pair(tmp_path, "110111", "1000"))
    assert (found.mean, found.num_pairs) == (50, 4)


def test_other_problems_are_no_pairs(tmp_path):
    one, other = pair(tmp_path, "1101", "1000")
    lines = (other.folder / "problems.jsonl").read_text().replace('"id": "1"', '"id": "other"')
    (other.folder / "problems.jsonl").write_text(lines)
    assert paired_difference(one, other) is None


def test_without_files_of_problems_their_number_must_be_the_same(tmp_path):
    assert paired_difference(*pair(tmp_path / "a", "1101", "100", problems=False)) is None
    assert paired_difference(*pair(tmp_path / "b", "1101", "1000", problems=False)).mean == 50


def test_torn_line_of_problems_is_passed_over(tmp_path):
    one, other = pair(tmp_path, "1101", "1000")
    with (one.folder / "problems.jsonl").open("a") as lines:
        lines.write('{"index": 4, "i')
    assert paired_difference(one, other).num_pairs == 4


def test_small_samples_have_wide_intervals():
    assert small_sample([1, 2, 3]).high == pytest.approx(2 + 4.303 / 3**0.5)
    assert small_sample([1]).low == -float("inf")


def test_fake_results_are_whole(tmp_path):
    path = write_row(tmp_path, fake_summary("serial", score=0.5, num_problems=10))
    assert json.loads((path / "summary.json").read_text())["score"]["num_correct"] == 5
