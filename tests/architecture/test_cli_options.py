"""The commands and their options are pinned in cli_options.json.

After a deliberate change, run this file: `.venv/bin/python tests/architecture/test_cli_options.py`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from d2f.cli.main import app

PINNED = Path(__file__).with_name("cli_options.json")


def collect_cli_options() -> dict[str, list[str]]:
    """Each command ("" is `d2f` itself, "bench step" a nested one) with its arguments and options.

    An argument is listed by its name in capitals, an option by all its spellings.
    """
    found: dict[str, list[str]] = {}

    def visit(command: Any, path: tuple[str, ...]) -> None:
        found[" ".join(path)] = [
            parameter.name.upper()
            if parameter.param_type_name == "argument"
            else " / ".join([*parameter.opts, *parameter.secondary_opts])
            for parameter in command.params
        ]
        for name, child in getattr(command, "commands", {}).items():
            visit(child, (*path, name))

    visit(typer.main.get_command(app), ())
    return {path: sorted(options) for path, options in sorted(found.items())}


def write_cli_options() -> None:
    """Pin the command line as it is now."""
    PINNED.write_text(json.dumps(collect_cli_options(), indent=2) + "\n", encoding="utf-8")


def test_command_line_is_pinned():
    assert collect_cli_options() == json.loads(PINNED.read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", [path for path in collect_cli_options() if path])
def test_help_shows_an_example(command):
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0, result.output
    assert f"d2f {command}" in result.output


def test_unknown_option_is_a_usage_error():
    assert CliRunner().invoke(app, ["generate", "--no-such-option"]).exit_code == 2


if __name__ == "__main__":
    write_cli_options()
