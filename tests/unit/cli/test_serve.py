"""`d2f serve`: starting, refusing to start, and ending."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

from d2f.cli import serve
from d2f.engine.generate import generate_ids
from d2f.models.checkpoint import load_model
from d2f.problems import extract_answer
from d2f.shipped import shipped_model
from d2f.testing import write_checkpoint
from d2f.text import Tokenizer

SOURCE = Path(serve.__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "llada", tokenizer=True)


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "small", "qwen2", tokenizer=True)


@pytest.fixture
def refused(d2f, folder):
    """Why the server does not start, in one line."""

    def run(*arguments, model=folder, code=1):
        done = d2f("serve", "--port", 0, "--device", "cpu", "--model", model, *arguments)
        assert (done.code, done.out) == (code, "")
        assert done.err.startswith("error: ")
        assert done.err.count("\n") == 1
        return done.err

    return run


def test_other_hosts_need_a_key(refused, monkeypatch):
    assert "--api-key" in refused("--host", "0.0.0.0", code=2)
    monkeypatch.setenv("D2F_API_KEY", "")
    assert "key" in refused("--host", "0.0.0.0", code=2)


def test_hosts_that_do_not_exist(refused):
    assert "'nowhere.invalid'" in refused("--host", "nowhere.invalid", "--api-key", "k")
    assert "192.0.2.1" in refused("--host", "192.0.2.1", "--api-key", "k")


def test_a_port_in_use(refused):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port}: address already in use" in refused("--port", port)


def test_models_that_cannot_be_loaded(refused, tmp_path):
    assert "nothing" in refused(model=tmp_path / "nothing")
    assert "race" in refused("--race-model", f"teacher={tmp_path / 'race'}")
    assert "adapter_config.json" in refused("--adapter", tmp_path)


@pytest.mark.parametrize("given", ["teacher", "=x", "teacher="])
def test_race_models_of_another_form(refused, given):
    assert f"--race-model {given!r} is not of the form NAME=DIR" in refused(
        "--race-model", given, code=2
    )


def test_names_are_given_once(refused, folder):
    twice = ("--race-model", f"a={folder}", "--race-model", f"a={folder}")
    assert "--race-model a is given twice" in refused(*twice, code=2)
    assert "name of its own" in refused("--race-model", f"tiny={folder}", code=2)


def test_values_out_of_range(refused):
    assert "finite" in refused("--request-timeout", "inf", code=2)


def test_missing_packages_are_named(refused, monkeypatch):
    monkeypatch.setattr(
        serve, "find_spec", lambda name: None if name == "uvicorn" else find_spec(name)
    )
    assert "d2f serve needs uvicorn: pip install 'd2f[serve]'" in refused()


@pytest.fixture
def started(folder, causal):
    """A server in a process of its own, as people start it."""
    command = [sys.executable, "-m", "d2f", "serve", "--port", "0", "--device", "cpu"]
    command += ["--model", str(folder), "--race-model", f"autoregressive={causal}"]
    paths = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("number", "code", "last"), [(signal.SIGTERM, 0, None), (signal.SIGINT, 130, "stopped")]
)
def test_serves_until_it_is_told_to_stop(started, folder, number, code, last):
    line = started.stdout.readline()
    assert line.startswith("serving tiny, autoregressive at http://127.0.0.1:")
    url = line.split()[4].rstrip(";")
    assert line.endswith(f"; the page is at {url.removesuffix('/v1')}/\n")
    body = {"messages": [{"role": "user", "content": "1+1="}], "max_tokens": 20}
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        answer = json.load(response)
    tokenizer = Tokenizer.load(folder)
    expected = generate_ids(
        load_model(folder, device="cpu"), tokenizer.encode_prompt("1+1="), max_new_tokens=20
    )
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode(expected.token_ids)
    with urllib.request.urlopen(f"{url}/models", timeout=30) as response:
        told = {model["id"]: model["d2f"] for model in json.load(response)["data"]}
    assert told["tiny"]["strategy"] == "vanilla"  # it carries no policy
    assert told["autoregressive"]["strategy"] == "autoregressive"
    started.send_signal(number)
    out, err = started.communicate(timeout=30)
    assert (started.returncode, out) == (code, "")
    assert last is None or err.splitlines()[-1] == last
    lines = [json.loads(line) for line in err.splitlines() if line != last]
    assert [line["endpoint"] for line in lines] == ["/v1/chat/completions", "/v1/models"]
    assert lines[0]["status"] == 200
    assert lines[0]["completion_tokens"] == answer["usage"]["completion_tokens"]
    assert "1+1=" not in err


def test_examples_differ_and_are_answered_rightly():
    examples = serve.example_problems()
    assert len({problem.structure for problem in examples}) == serve.NUM_EXAMPLES
    folder = shipped_model()
    tokenizer = Tokenizer.load(folder)
    results = generate_ids(
        load_model(folder, device="cpu", dtype="float32"),
        [tokenizer.encode_prompt(problem.prompt) for problem in examples],
    )
    answers = [extract_answer(tokenizer.decode(result.token_ids)) for result in results]
    assert answers == [problem.answer for problem in examples]
