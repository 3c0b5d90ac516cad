"""Exit codes and how errors reach people."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests.forked import run_code

import d2f as package
from d2f.cli import main as module
from d2f.cli.device import choose_device, fastest_dtype
from d2f.errors import ConfigError

START = "from d2f.cli.main import main; main()"


def test_help_and_version(d2f):
    done = d2f("--help")
    assert done.code == 0
    for command in ("demo", "generate", "train", "inspect"):
        assert command in done.out
    assert d2f("--version").out == f"d2f {package.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [["generate"], ["generate", "x", "--no-such"], ["no-such"], ["demo", "--num-problems", "0"]],
)
def test_wrong_use_is_exit_code_2(d2f, arguments):
    done = d2f(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "Usage:" in done.err


def test_help_loads_no_torch():
    code = f"import sys\ntry:\n    {START}\nfinally:\n    print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "False"


def test_errors_of_a_process_are_one_line():
    done = run_code(START, "inspect", "/no/such/model")
    assert (done.codes, done.out) == ([1], "")
    assert done.errors == [
        "error: there is no folder '/no/such/model'; give a folder or a hub id like owner/name\n"
    ]


def test_debug_shows_the_traceback():
    done = run_code(START, "--debug", "inspect", "/no/such/model")
    assert done.codes == [1]
    assert "Traceback" in done.errors[0]
    assert done.errors[0].splitlines()[-1].startswith("error: there is no folder")


def test_an_error_of_ours_names_its_kind(d2f, monkeypatch):
    def fail():
        raise RuntimeError("one\ntwo [bold]")

    monkeypatch.setattr(module, "app", fail)
    done = d2f()
    assert done.code == 1
    assert done.err == "error: RuntimeError: one two [bold] (d2f --debug … shows where)\n"


def test_ctrl_c_is_exit_code_130(d2f, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "app", interrupt)
    assert d2f() == (130, "", "stopped\n")


def test_inspect(d2f):
    from d2f.shipped import shipped_model

    done = d2f("inspect", shipped_model())
    assert done.code == 0
    assert "Dream, decodes by diffusion" in done.out


def test_device_and_dtype():
    assert choose_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="device 'nowhere' cannot be used"):
        choose_device("nowhere")
    assert fastest_dtype("cpu") in ("float32", "bfloat16")
    assert fastest_dtype("cuda") == "bfloat16"
