"""The page and its pictures."""

import json
import re
import sys

import pytest
from matplotlib.figure import Figure

from d2f.errors import ConfigError
from d2f.evaluation.report import figures
from d2f.evaluation.report.document import build_report, markdown, write_report
from d2f.evaluation.report.results import load_results
from d2f.testing.results import fake_summary, write_results, write_row

PICTURES = {
    "figure1.png", "figure2.png", "score-seconds.png", "score-parallelism.png", "figure5.png",
    "batch.png",
}  # fmt: skip


def page(folder, *, paper=False):
    results = load_results([folder])
    return markdown(build_report(results, paper=paper), [], "d2f report results")


def test_page_and_pictures_of_everything(tmp_path):
    """Two test sets, the paper beside: every table, every figure, small files."""
    write_results(tmp_path / "a")
    write_results(tmp_path / "b", test_set="other fakes", task="functions")
    report = build_report(load_results([tmp_path]), paper=True)
    out = tmp_path / "out" / "report"
    file = write_report(report, out, paper=True, figures=True, command="d2f report x")
    text = file.read_text()
    assert {path.name for path in out.iterdir()} == PICTURES | {"README.md", "tables.json"}
    assert json.loads((out / "tables.json").read_text()) == report.to_dict() | {"missing": []}
    assert text.startswith("# Results: fake family on fake problems, other fakes\n")
    for name in PICTURES:
        content = (out / name).read_bytes()
        assert content.startswith(b"\x89PNG\r\n")
        assert 10_000 < len(content) < 120_000
        assert f"]({name})" in text
    headings = re.findall(r"^## (.*)", text, re.MULTILINE)
    assert headings == [
        "Methods (tables 1 and 2)", "Thresholds (table 3)", "Noise schedule (table 4)",
        "The cache and parallelism (tables 5 and 7)", "Fine-tuning alone (table 6)",
        "Score against cost (figure 2)", "Block size (figure 5)", "Batch size",
        "How well speeds repeat", "The paper's claims, one by one", "Figures",
        "Where this was measured, and how to repeat it",
    ]  # fmt: skip
    assert text.count("### Methods: ") == 2
    assert "Not measured" not in text


def test_every_table_is_rectangular(tmp_path):
    lines = page(write_results(tmp_path), paper=True).splitlines()
    blocks = "\n".join(line if line.startswith("|") else "" for line in lines).split("\n\n")
    tables = [block.strip().splitlines() for block in blocks if block.strip()]
    assert len(tables) == 13
    for table in tables:
        assert len({len(line) for line in table}) == 1
        assert len({line.count(" | ") for line in table}) == 1
        assert re.fullmatch(r"\|( -+:? \|)+", table[1])


def test_paper_is_left_out_unless_wanted(tmp_path):
    write_results(tmp_path)
    assert "A100" not in page(tmp_path)
    assert "A100" in page(tmp_path, paper=True)


def test_missing_experiments_are_told(tmp_path):
    write_row(tmp_path, fake_summary("vanilla"))
    text = page(tmp_path)
    assert (
        "Not measured of fake family on fake problems: thresholds (table 3), noise (table 4), "
        "control (table 6), steps (figure 2), block-size (figure 5), batch (batch sizes)."
    ) in text
    assert "## Thresholds" not in text


def test_ablations_need_no_test_set_of_the_same_name(tmp_path):
    """One alone lacks nothing, and the methods of its family do not lack it."""
    labels = {"schedule": "random", "seed": 1}
    noise = fake_summary("n", experiment="noise", labels=labels, test_set="fake problems, 0.9")
    write_row(tmp_path / "noise", noise)
    write_row(tmp_path / "other", fake_summary("vanilla", family="other family"))
    text = page(tmp_path)
    assert text.startswith("# Results: other family on fake problems\n")
    assert text.count("Not measured") == text.count("Not measured of other family") == 1
    assert "noise (table 4)" in text.splitlines()[2]
    write_row(tmp_path / "methods", fake_summary("vanilla"))
    [line] = [x for x in page(tmp_path).splitlines() if "Not measured of fake family" in x]
    assert "noise" not in line


def test_results_of_ablations_alone_have_a_title(tmp_path):
    write_row(tmp_path, fake_summary("control", experiment="control"))
    assert page(tmp_path).startswith("# Results: fake family on fake problems\n")


def test_warnings_stand_at_the_top_and_below_tables(tmp_path):
    write_row(tmp_path, fake_summary("vanilla"))
    summary = fake_summary("serial")
    summary["environment"] = summary["environment"] | {"git_dirty": True}
    write_row(tmp_path, summary)
    half = write_row(tmp_path, fake_summary("pipelined"))
    (half / "summary.json").unlink()
    text = page(tmp_path)
    assert text.splitlines()[2] == f"**Warning:** not finished and left out: {half}"
    assert (
        "**Warning: rows differ in git commit:** 0123456789ab (vanilla); "
        "0123456789ab with changes (serial)"
    ) in text


def test_footer_repeats(tmp_path):
    write_row(tmp_path, fake_summary("vanilla", recipe_file="recipes/eval/one.toml"))
    text = page(tmp_path)
    assert "- fake processor, float32; torch 0.0; commit 0123456789ab; 2000-01-01" in text
    assert "```\nd2f eval recipes/eval/one.toml\nd2f report results\n```" in text


def test_numbers_as_json(tmp_path):
    write_results(tmp_path)
    found = build_report(load_results([tmp_path]), paper=True).to_dict()
    [table] = [table for table in found["tables"] if table["name"] == "methods"]
    [line] = [line for line in table["rows"] if line["label"] == "pipelined"]
    assert line["over_autoregressive"] == pytest.approx(1000 / 300)
    assert line["tokens_per_second"] == {"median": 1000, "lowest": 980, "highest": 1030}
    assert line["difference"].keys() == {"mean", "low", "high", "num_pairs"}
    assert line.keys() == table["columns"].keys()


def test_only_pictures_with_rows_are_drawn(tmp_path):
    write_row(tmp_path, fake_summary("vanilla", score=None))
    found = load_results([tmp_path]).comparisons
    assert figures.draw_figures(found, tmp_path, paper=True) == []


def drawn(monkeypatch, comparisons, folder, paper):
    """Figures by title, in place of files."""
    kept = {}
    save = Figure.savefig

    def keep(self, *arguments, **options):
        kept[self.get_suptitle()] = self
        save(self, *arguments, **options | {"dpi": 20})

    monkeypatch.setattr(Figure, "savefig", keep)
    figures.draw_figures(comparisons, folder, paper=paper)
    return kept


def test_what_figures_show(tmp_path, monkeypatch):
    write_results(tmp_path)
    found = drawn(monkeypatch, load_results([tmp_path]).comparisons, tmp_path, True)
    bars = found["Tokens per second at batch 1"].axes[0]
    assert [bar.get_width() for bar in bars.patches] == [80, 330, 300, 1000]
    assert bars.get_xscale() == "log"
    assert "1000 (3.33x)" in [text.get_text() for text in bars.texts]
    hollow = [point for line in bars.lines for point in line.get_xdata()]
    assert 300 * 119.9 / 48 in hollow
    curves = found["Score against tokens per second"].axes[0]
    labels = curves.get_legend_handles_labels()[1]
    assert {"D2F, thresholds", "autoregressive", "pipelined (paper, A100, 8B)"} <= set(labels)
    areas = found["Score against tokens per forward"].axes[0].get_legend_handles_labels()[1]
    assert "autoregressive, AUP 94.5" in areas


def test_bars_that_can_all_be_seen_keep_an_even_axis(tmp_path, monkeypatch):
    write_row(tmp_path, fake_summary("vanilla", speed=100))
    write_row(tmp_path, fake_summary("pipelined", speed=1000))
    found = drawn(monkeypatch, load_results([tmp_path]).comparisons, tmp_path, False)
    bars = found["Tokens per second at batch 1"].axes[0]
    assert (bars.get_xscale(), bars.get_xlim()[0]) == ("linear", 0)
    assert [text.get_text() for text in bars.texts] == ["100", "1000"]


def test_low_scores_keep_an_even_axis(tmp_path, monkeypatch):
    write_row(tmp_path, fake_summary("vanilla", score=0.02))
    write_row(tmp_path, fake_summary("pipelined", score=0.01))
    found = drawn(monkeypatch, load_results([tmp_path]).comparisons, tmp_path, False)
    assert found["Score against seconds per problem"].axes[0].get_yscale() == "linear"
    assert found["Score against tokens per second"].axes[0].get_xlabel() == "tokens per second"


def test_without_matplotlib(tmp_path, monkeypatch):
    write_row(tmp_path / "results", fake_summary("vanilla"))
    report = build_report(load_results([tmp_path / "results"]), paper=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = {"paper": False, "command": "d2f report"}
    with pytest.raises(ConfigError, match=r"pip install matplotlib, or .* --no-figures"):
        write_report(report, tmp_path / "out", figures=True, **options)
    assert write_report(report, tmp_path / "out", figures=False, **options).exists()
