import io
import sys
from typing import NamedTuple

import pytest

from d2f.cli.main import main


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
