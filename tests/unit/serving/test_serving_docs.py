"""Examples of docs/serving.md work: Python against a live server, commands and tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from tests.unit.serving.live import live_server

from d2f.cli import ray_app
from d2f.cli.decoding_options import ModelChoice
from d2f.cli.main import app
from d2f.cli.serve import main_model
from d2f.serving.metrics import Metrics
from d2f.serving.protocol import ChatBody, CompletionBody, Policy

TEXT = (Path(__file__).parents[3] / "docs/serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"
PYTHON = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def address():
    with live_server(main_model(ModelChoice(device="cpu", dtype="float32"), None, 4)) as server:
        yield server.url


@pytest.mark.parametrize("code", PYTHON)
def test_python(code, address, capsys):
    assert ADDRESS in code
    exec(compile(code.replace(ADDRESS, address), "docs/serving.md", "exec"), {})
    out = capsys.readouterr().out
    assert "37" in out or out.count("ahead") > 1


def test_there_are_snippets():
    assert len(PYTHON) == 3


@pytest.mark.parametrize("name", ["serve", "chat"])
def test_options_exist(name):
    command = typer.main.get_command(app).commands[name]
    known = {spelling for option in command.params for spelling in option.opts}
    shown = [line for line in TEXT.splitlines() if line.startswith(f"d2f {name}")]
    used = set(re.findall(r"--[a-z-]+", " ".join(shown)))
    assert shown
    assert used <= known
    if name == "serve":
        assert all(f"`{option}" in TEXT for option in known if option != "--help")


@pytest.mark.parametrize("kind", [ChatBody, CompletionBody, Policy, ray_app.RayArguments])
def test_every_field_is_told(kind):
    assert [name for name in kind.model_fields if f"`{name}`" not in TEXT] == []


def test_every_metric_is_told():
    text = Metrics([]).render()[0].decode()
    names = set(re.findall(r"^# TYPE d2f_(\w+) (?:counter|gauge|histogram)", text, re.MULTILINE))
    created = {name for name in names if name.endswith("_created")}
    assert [name for name in names - created if f"`{name}" not in TEXT] == []
