"""The page and its pictures."""

import json
import re
import sys

import pytest
from matplotlib.figure import Figure
from tests.unit.evaluation.fake_results import fake_summary, write_results, write_row

from d2f.errors import ConfigError
from d2f.evaluation.report import figures
from d2f.evaluation.report.document import build_report, markdown, write_report
from d2f.evaluation.report.reading import load_results

PICTURES = {"speed.png", "score-speed.png", "score-seconds.png", "score-parallelism.png"}


def page(folder):
    return markdown(build_report(load_results([folder])), [], "d2f report results")


def test_page_and_pictures_of_everything(tmp_path):
    """Every table, every figure, small files."""
    write_results(tmp_path / "a")
    report = build_report(load_results([tmp_path]))
    out = tmp_path / "out" / "report"
    file = write_report(report, out, figures=True, command="d2f report x")
    text = file.read_text()
    assert {path.name for path in out.iterdir()} == PICTURES | {"README.md", "tables.json"}
    assert json.loads((out / "tables.json").read_text()) == report.to_dict()
    assert text.startswith("# Results: fake family on fake problems\n")
    for name in PICTURES:
        content = (out / name).read_bytes()
        assert content.startswith(b"\x89PNG\r\n")
        assert 10_000 < len(content) < 120_000
        assert f"]({name})" in text
    headings = re.findall(r"^## (.*)", text, re.MULTILINE)
    assert headings == [
        "Methods", "Settings varied", "Score against cost", "Figures",
        "Where this was measured, and how to repeat it",
    ]  # fmt: skip


def test_every_table_is_rectangular(tmp_path):
    lines = page(write_results(tmp_path)).splitlines()
    blocks = "\n".join(line if line.startswith("|") else "" for line in lines).split("\n\n")
    tables = [block.strip().splitlines() for block in blocks if block.strip()]
    assert len(tables) == 10
    for table in tables:
        assert len({len(line) for line in table}) == 1
        assert len({line.count(" | ") for line in table}) == 1
        assert re.fullmatch(r"\|( -+:? \|)+", table[1])


def test_an_experiment_alone_has_its_table_and_no_other(tmp_path):
    write_row(tmp_path, fake_summary("n", experiment="noise", labels={"seed": 1}))
    headings = re.findall(r"^### (.*)", page(tmp_path), re.MULTILINE)
    assert headings == ["Noise: fake family on fake problems"]


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
    found = build_report(load_results([tmp_path])).to_dict()
    [table] = [table for table in found["tables"] if table["name"] == "methods"]
    [line] = [line for line in table["rows"] if line["label"] == "pipelined"]
    assert line["over_autoregressive"] == pytest.approx(1000 / 300)
    assert line["tokens_per_second"] == {"median": 1000, "lowest": 980, "highest": 1030}
    assert line["difference"].keys() == {"mean", "low", "high", "num_pairs"}
    assert line.keys() == table["columns"].keys()


def test_only_pictures_with_rows_are_drawn(tmp_path):
    write_row(tmp_path, fake_summary("vanilla", score=None))
    found = load_results([tmp_path]).comparisons
    assert figures.draw_figures(found, tmp_path) == []


def drawn(monkeypatch, comparisons, folder):
    """Figures by title, in place of files."""
    kept = {}
    save = Figure.savefig

    def keep(self, *arguments, **options):
        kept[self.get_suptitle()] = self
        save(self, *arguments, **options | {"dpi": 20})

    monkeypatch.setattr(Figure, "savefig", keep)
    figures.draw_figures(comparisons, folder)
    return kept


def test_bars_that_can_all_be_seen_keep_an_even_axis(tmp_path, monkeypatch):
    write_row(tmp_path, fake_summary("vanilla", speed=100))
    write_row(tmp_path, fake_summary("pipelined", speed=1000))
    found = drawn(monkeypatch, load_results([tmp_path]).comparisons, tmp_path)
    bars = found["Tokens per second at batch 1"].axes[0]
    assert (bars.get_xscale(), bars.get_xlim()[0]) == ("linear", 0)
    assert [text.get_text() for text in bars.texts] == ["100", "1000"]


def test_low_scores_keep_an_even_axis(tmp_path, monkeypatch):
    write_row(tmp_path, fake_summary("vanilla", score=0.02))
    write_row(tmp_path, fake_summary("pipelined", score=0.01))
    found = drawn(monkeypatch, load_results([tmp_path]).comparisons, tmp_path)
    assert found["Score against seconds per problem"].axes[0].get_yscale() == "linear"
    assert found["Score against tokens per second"].axes[0].get_xlabel() == "tokens per second"


def test_without_matplotlib(tmp_path, monkeypatch):
    write_row(tmp_path / "results", fake_summary("vanilla"))
    report = build_report(load_results([tmp_path / "results"]))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = {"command": "d2f report"}
    with pytest.raises(ConfigError, match=r"pip install matplotlib, or .* --no-figures"):
        write_report(report, tmp_path / "out", figures=True, **options)
    assert write_report(report, tmp_path / "out", figures=False, **options).exists()
