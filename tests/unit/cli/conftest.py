import io
import sys
from typing import NamedTuple

import pytest

from d2f.cli.main import main
from d2f.diffusion.policy import DecodingPolicy
from d2f.evaluation import rates
from d2f.evaluation.rates import Rates
from d2f.models import presets
from d2f.testing import tiny_spec, write_checkpoint

POLICY = DecodingPolicy(block_size=8, confidence_threshold=0.5)


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def d2f(monkeypatch, capsys):
    """Run the command line in this process, as `main` does in one of its own."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["d2f", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return Done(int(stop.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny diffusion model with a tokenizer."""
    path = tmp_path_factory.mktemp("llada")
    return write_checkpoint(path, "llada", policy=POLICY, tokenizer=True)


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("qwen2"), "qwen2", tokenizer=True)


@pytest.fixture
def tiny_presets(monkeypatch):
    """The presets at sizes that a test can afford."""
    for name, kind in (("llada-8b", "llada"), ("dream-7b", "Dream"), ("qwen2.5-7b", "qwen2")):
        monkeypatch.setitem(presets.PRESETS, name, tiny_spec(kind))


@pytest.fixture
def given_rates(monkeypatch):
    """Rates that need not be measured."""
    found = Rates(copy_bytes_per_second=1e9, matmul_flops_per_second=1e11, matmul_size=64)
    monkeypatch.setattr(rates, "measure_rates", lambda *_: found)
