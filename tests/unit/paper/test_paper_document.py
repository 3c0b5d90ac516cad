"""The report beside the paper: its page, its pictures, and the script that writes it."""

import json
import re
import runpy
from pathlib import Path

from benchmarks.paper.document import build_report
from benchmarks.paper.figures import PANELS
from matplotlib.figure import Figure
from tests.unit.evaluation.fake_results import fake_summary, write_results, write_row

from d2f.evaluation.report import figures
from d2f.evaluation.report.document import markdown, write_report
from d2f.evaluation.report.reading import load_results

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "paper_report.py"
PICTURES = {
    "figure1.png", "figure2.png", "score-seconds.png", "score-parallelism.png", "figure5.png",
    "batch.png",
}  # fmt: skip


def page(folder):
    return markdown(build_report(load_results([folder])), [], "paper_report results")


def test_page_and_pictures_of_everything(tmp_path):
    """Two test sets, the paper beside: every table, every figure, small files."""
    write_results(tmp_path / "a")
    write_results(tmp_path / "b", test_set="other fakes", task="functions")
    report = build_report(load_results([tmp_path]))
    out = tmp_path / "out" / "report"
    file = write_report(report, out, figures=True, command="x", panels=PANELS)
    text = file.read_text()
    assert {path.name for path in out.iterdir()} == PICTURES | {"README.md", "tables.json"}
    assert json.loads((out / "tables.json").read_text()) == report.to_dict()
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
    assert "A100" in text


def test_every_table_is_rectangular(tmp_path):
    lines = page(write_results(tmp_path)).splitlines()
    blocks = "\n".join(line if line.startswith("|") else "" for line in lines).split("\n\n")
    tables = [block.strip().splitlines() for block in blocks if block.strip()]
    assert len(tables) == 13
    for table in tables:
        assert len({len(line) for line in table}) == 1
        assert len({line.count(" | ") for line in table}) == 1
        assert re.fullmatch(r"\|( -+:? \|)+", table[1])


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


def test_what_figures_show(tmp_path, monkeypatch):
    write_results(tmp_path)
    found = {}
    save = Figure.savefig

    def keep(self, *arguments, **options):
        found[self.get_suptitle()] = self
        save(self, *arguments, **options | {"dpi": 20})

    monkeypatch.setattr(Figure, "savefig", keep)
    figures.draw_figures(load_results([tmp_path]).comparisons, tmp_path, PANELS[:4])
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


def test_only_pictures_with_rows_are_drawn(tmp_path):
    write_row(tmp_path, fake_summary("vanilla", score=None))
    assert figures.draw_figures(load_results([tmp_path]).comparisons, tmp_path, PANELS) == []


def test_script_writes_the_report_and_prints_the_verdicts(tmp_path, monkeypatch, capsys):
    results = write_results(tmp_path / "results")
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    script = runpy.run_path(str(SCRIPT))
    script["main"]([str(results), "--no-figures", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "reproduced: faster than Fast-dLLM (fake family on fake problems)" in printed
    tables = json.loads((tmp_path / "out" / "tables.json").read_text())["tables"]
    names = {table["name"] for table in tables}
    assert names >= {"methods", "thresholds", "noise", "cache", "control", "claims"}
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"python benchmarks/paper_report.py {results}\n" in text
