"""`d2f report` from end to end, on results that are made up."""

import json

import pytest
from tests.unit.evaluation.fake_results import fake_summary, write_results, write_row


@pytest.fixture
def results(tmp_path):
    return write_results(tmp_path / "results")


def test_report_goes_beside_the_results(d2f, results):
    done = d2f("report", results, "--no-figures")
    assert done.code == 0, done.err
    assert f"Report written to {results / 'report' / 'README.md'}" in done.out
    assert "Methods: fake family on fake problems" in done.out
    [line] = [line for line in done.out.splitlines() if line.startswith("pipelined")]
    assert line.split() == [
        "pipelined", "1000", "3.33x", "12.5x", "0.0500", "50.0", "94.9", "±", "0.7", "(1000)",
    ]  # fmt: skip
    assert max(map(len, done.out.split("Report written")[0].splitlines())) <= 80
    assert "A100" not in (results / "report" / "README.md").read_text()
    # Again: the report is no result.
    assert d2f("report", results, "--no-figures").code == 0


def test_output_figures_and_json(d2f, results, tmp_path):
    done = d2f("report", results, "--output", tmp_path / "out")
    assert done.code == 0, done.err
    tables = json.loads((tmp_path / "out" / "tables.json").read_text())["tables"]
    names = {table["name"] for table in tables}
    assert names >= {"methods", "reasons", "settings", "thresholds", "curves"}
    assert (tmp_path / "out" / "speed.png").stat().st_size > 10_000
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"d2f report {results}\n" in text


def test_warnings_reach_the_terminal(d2f, results):
    half = write_row(results, fake_summary("half"))
    (half / "summary.json").unlink()
    slow = fake_summary("vanilla", experiment="methods")
    slow["environment"] = slow["environment"] | {"processor": "another"}
    write_row(results / "methods", slow)
    done = d2f("report", results, "--no-figures")
    assert f"warning: not finished and left out: {half}" in " ".join(done.err.split())
    assert "Warning: rows differ in processor" in done.out


def test_names_are_shown_as_they_are(d2f, tmp_path):
    write_row(tmp_path, fake_summary("vanilla", label="[/v]", family="[bold] family"))
    done = d2f("report", tmp_path, "--no-figures")
    assert done.code == 0, done.err
    assert "[/v]" in done.out
    assert "Methods: [bold] family on fake problems" in done.out


def test_long_names_are_broken_and_numbers_are_not(d2f, tmp_path):
    write_row(tmp_path, fake_summary("vanilla", label="vanilla " + "of many words " * 4))
    done = d2f("report", tmp_path, "--no-figures")
    assert "…" not in done.out
    assert "90.0 ± 0.9 (1000)" in done.out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: folder.unlink(), "has no results"),
        (lambda folder: folder.write_text("{"), "summary.json cannot be read as JSON"),
        (lambda folder: folder.write_text('{"format": 9}'), "has format 9"),
    ],
)
def test_bad_input_is_one_line(d2f, tmp_path, change, words):
    change(write_row(tmp_path, fake_summary("vanilla")) / "summary.json")
    done = d2f("report", tmp_path)
    assert done.code == 1
    assert words in done.err
    assert len(done.err.splitlines()) == 1


def test_usage(d2f, tmp_path):
    assert d2f("report").code == 2
    done = d2f("report", tmp_path / "nowhere")
    assert (done.code, "is not a folder" in done.err) == (1, True)
