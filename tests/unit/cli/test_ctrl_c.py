"""Ctrl-C ends every command with exit code 130 and one line, wherever it comes."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time

import pytest

from d2f.cli.ctrl_c import CtrlC
from d2f.cli.main import main

START = "from d2f.__main__ import main; main()"
WHERE = {
    "d2f.models.checkpoint.load_model": [
        ["demo", "--no-plot"],
        ["generate", "x"],
        ["chat"],
        ["serve", "--port", "0"],
        ["bench", "race"],
        ["bench", "step"],
    ],
    "d2f.models.presets.random_model": [["bench", "race", "--shape", "llada-8b", "--accept", "4"]],
    "d2f.training.run.train": [["train", "tiny_cpu_autoregressive"]],
    "d2f.evaluation.rates.measure_rates": [["bench", "train"]],
    "d2f.evaluation.eval_run.Evaluation.run": [
        ["eval", "word_problems", "--output", "o", "--num-problems", "2"]
    ],
    "d2f.evaluation.report.reading.load_results": [["report", "o"]],
    "d2f.hub.resolve_folder": [["inspect", "o"], ["generate", "x"]],
}


@pytest.fixture(autouse=True)
def handler():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(*_arguments, **_settings):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)


@pytest.mark.parametrize(
    ("target", "arguments"),
    [(target, arguments) for target, many in WHERE.items() for arguments in many],
)
def test_every_command(d2f, monkeypatch, tmp_path, target, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(target, interrupt)
    done = d2f(*arguments)
    assert done.code == 130
    last = done.err.splitlines()[-1]
    assert last.startswith("stopped")
    assert "Traceback" not in done.err


def test_it_is_not_swallowed_by_an_import(tmp_path, monkeypatch):
    (tmp_path / "greedy.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(0.2)\n"
        "except BaseException:\n    print('swallowed')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def run():
        with CtrlC():
            importlib.import_module("greedy")
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        run()


def test_it_is_not_swallowed_by_a_destructor(capsys):
    class Held:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    def run():
        with CtrlC():
            Held()
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert capsys.readouterr().err == ""


def test_a_library_that_fails_of_it_is_not_to_blame(monkeypatch, capsys):
    def fail():
        try:
            interrupt()
        except KeyboardInterrupt:
            raise ImportError("numpy could not be initialised") from None

    monkeypatch.setattr("d2f.cli.main.app", fail)
    with pytest.raises(SystemExit) as stop:
        main()
    assert (stop.value.code, capsys.readouterr().err) == (130, "stopped\n")


def test_where_it_is_ignored_it_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with CtrlC() as ctrl_c:
        os.kill(os.getpid(), signal.SIGINT)
    assert not ctrl_c.came


def test_while_the_command_line_itself_is_loaded(tmp_path):
    (tmp_path / "typer.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(10)\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {START}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")
