"""Commands and code that the README tells people to type work.

Python blocks are executed and `d2f` lines of bash blocks are run, each in an empty folder that has
the repository's recipes. A block after `<!-- not run: reason -->` is only checked: its Python must
compile, its commands and options must exist. `make` lines must name existing targets.
"""

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from tests.forked import run_code

from d2f.cli.main import app

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"(?P<skip><!-- not run: [^>]+ -->\s*)?"
    r"^```(?P<language>python|bash)\n(?P<code>.*?)^```",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    line: int
    language: str
    code: str
    is_run: bool


def readme_blocks() -> list[Block]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [
        Block(
            text[: match.start("code")].count("\n") + 1,
            match["language"],
            match["code"],
            not match["skip"],
        )
        for match in FENCE.finditer(text)
    ]


def command_lines(block: Block) -> list[list[str]]:
    """The words of each command, continuation lines joined and comments dropped."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


BLOCKS = readme_blocks()
PYTHON = [block for block in BLOCKS if block.language == "python"]
COMMANDS = [
    pytest.param(words, block.is_run, id=f"line-{block.line}-{' '.join(words)[:40]}")
    for block in BLOCKS
    if block.language == "bash"
    for words in command_lines(block)
]


def run_python(code: str, folder: Path, *arguments: str) -> None:
    """Run code as a user's own process would, with the package of this checkout."""
    (folder / "recipes").symlink_to(ROOT / "recipes", target_is_directory=True)
    done = run_code(code, *arguments, folder=folder)
    assert done.codes == [0], done.out + done.errors[0]


def check_command_exists(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    assert not hasattr(command, "commands"), f"no such command: {shlex.join(words)}"
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    used = {word.partition("=")[0] for word in rest if word.startswith("--")}
    assert used <= known | {"--help"}, f"no such option: {used - known}"


def test_readme_shows_both_ways_of_use():
    assert any(block.is_run for block in PYTHON)
    assert ["make", "demo"] in [command.values[0] for command in COMMANDS]
    assert ["make", "test"] in [command.values[0] for command in COMMANDS]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"line-{block.line}")
def test_python_snippet(block, tmp_path):
    compile(block.code, f"README.md:{block.line}", "exec")
    if block.is_run:
        run_python(block.code, tmp_path)


@pytest.mark.parametrize(("words", "is_run"), COMMANDS)
def test_command(words, is_run, tmp_path):
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        goals = [word for word in words[1:] if "=" not in word]
        assert set(goals) <= set(targets)
    elif words[0] == "d2f":
        check_command_exists(words)
        if is_run:
            start = "import sys; from d2f.cli.main import main; sys.exit(main())"
            run_python(start, tmp_path, *words[1:])
