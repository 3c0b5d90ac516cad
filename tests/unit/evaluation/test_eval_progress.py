"""A run tells its progress: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import pytest
from rich.console import Console

from d2f.evaluation import eval_progress
from d2f.evaluation.eval_progress import Terminal


def report(terminal):
    for done in (1, 2, 3):
        terminal.progress("serial", done, 3, f"score {done}%")
    terminal.note("[a note]")
    terminal.close()


def test_a_terminal_has_a_bar_for_each_row(monkeypatch, capsys):
    monkeypatch.setattr(Console, "is_terminal", property(lambda console: True))
    report(Terminal())
    shown = capsys.readouterr().err
    assert "serial" in shown
    assert "3/3" in shown
    assert "score 3%" in shown
    assert "[a note]" in shown


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, ["1/3", "2/3", "3/3"]), (1e9, ["3/3"])])
def test_elsewhere_lines_come_now_and_then(monkeypatch, capsys, seconds, lines):
    monkeypatch.setattr(eval_progress, "PLAIN_SECONDS", seconds)
    report(Terminal())
    shown = capsys.readouterr().err.splitlines()
    assert shown == [f"serial  {line}  score {line[0]}%" for line in lines] + ["[a note]"]
