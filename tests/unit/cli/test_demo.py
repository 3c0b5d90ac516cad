"""`d2f demo` from end to end on the shipped models, and how it looks."""

from __future__ import annotations

import json
import re
import sys

import pytest
from rich.console import Console

from d2f.cli import demo
from d2f.cli.live import legend, render_blocks
from d2f.decoding.batch import BlockState, BlockView
from d2f.problems import ProblemConfig, generate_problems
from d2f.testing import write_tokenizer
from d2f.text import Tokenizer

ROWS = ["autoregressive", "vanilla", "vanilla-eos-stop", "serial", "pipelined"]
CONTRACT = {
    "name", "num_problems", "score", "tokens_per_second", "tokens_per_forward",
    "query_tokens_per_forward", "seconds_per_problem", "mean_tokens",
}  # fmt: skip
SEED = 7
"""Two problems with short solutions, so that a whole answer of vanilla diffusion is short, too."""
SMALL = ("--no-live", "--seed", SEED, "--num-problems", 2, "--num-vanilla", 1, "--device", "cpu")


@pytest.mark.slow
def test_race_of_the_shipped_models(d2f, tmp_path):
    results, plot = tmp_path / "race.json", tmp_path / "race.png"
    done = d2f("demo", *SMALL, "--dtype", "float32", "--json", results, "--plot", plot)
    assert done.code == 0, done.err
    written = json.loads(results.read_text())
    rows = {row["name"]: row for row in written["rows"]}
    assert list(rows) == ROWS
    assert all(row.keys() >= CONTRACT for row in rows.values())
    assert [row["num_problems"] for row in rows.values()] == [2, 1, 1, 2, 2]
    assert rows["autoregressive"]["tokens_per_forward"] == 1
    assert rows["vanilla"]["tokens_per_forward"] <= 1
    assert rows["vanilla-eos-stop"]["tokens_per_forward"] <= 1
    assert rows["pipelined"]["tokens_per_forward"] >= 8
    environment = written["environment"]
    assert environment["dtype"] == "float32"
    assert environment["seed"] == SEED
    assert environment["max_new_tokens"] == 64
    assert plot.read_bytes().startswith(b"\x89PNG")
    check_report(done.out.split("Rows written")[0])
    assert re.search(r"pipelined is +[\d.]+x autoregressive: ", done.out)


def check_report(text):
    """All of it is readable in 80 columns."""
    lines = text.splitlines()
    assert [line for line in lines if len(line.rstrip()) > 80] == []
    assert "…" not in text
    for name in ROWS:
        line = next(line for line in lines if line.startswith(f"{name} "))
        assert len(line.split()) == 10  # the score is two words


def test_files_are_checked_before_the_race(d2f, tmp_path, monkeypatch):
    monkeypatch.setattr("d2f.models.checkpoint.load_model", lambda *_, **__: pytest.fail("began"))
    for option in ("--json", "--plot"):
        done = d2f("demo", option, tmp_path / "missing" / "file")
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert f"cannot write {tmp_path}" in done.err
        assert d2f("demo", option, tmp_path).code == 2
    for name in ("race.xyz", "race.json", "race.part"):
        done = d2f("demo", "--plot", tmp_path / name)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "is no picture that can be drawn" in done.err
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib(d2f, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    monkeypatch.setattr("d2f.models.checkpoint.load_model", lambda *_, **__: sys.exit(0))
    asked = d2f("demo", "--plot", "race.png")
    assert asked.code == 1
    assert "--plot needs matplotlib: pip install matplotlib" in asked.err
    assert "no plot is drawn" in d2f("demo").err
    assert d2f("demo", "--no-plot").err == ""


def test_live_view_of_a_pipe(d2f, monkeypatch):
    from d2f.models.checkpoint import load_model
    from d2f.shipped import shipped_model

    console = Console(width=80, record=True, force_terminal=False, file=sys.stderr)
    monkeypatch.setattr(demo, "out", console)
    hard = ProblemConfig(min_steps=6, shuffle_rate=1.0)
    [problem] = generate_problems(1, seed=4, split="test", config=hard)
    model = load_model(shipped_model(), device="cpu", dtype="float32")
    demo._show_live(model, Tokenizer.load(shipped_model()), 4)
    text = console.export_text()
    assert " ".join(problem.prompt.split()) in " ".join(text.split())
    assert "  1 " in text
    assert "[cached]" in text
    assert "· is not decoded yet, ■ is the end" in " ".join(text.split())
    assert f", the answer is {problem.answer}" in text


def test_blocks_have_the_colours_of_their_states(tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path))
    a, b = tokenizer.encode("ab")
    views = [
        BlockView(state=BlockState.CACHED, token_ids=(a, b), probabilities=(1.0, 0.9)),
        BlockView(
            state=BlockState.SEMI_ACTIVE,
            token_ids=(None, b, 95),
            probabilities=(None, 0.9, 1.0),
        ),
    ]
    text = render_blocks(views, tokenizer)
    assert text.plain == "ab·b■"
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles["ab"] == "white on grey30"
    assert styles["·b■"] == "black on bright_yellow"
    assert all(state.value in legend().plain for state in BlockState)
