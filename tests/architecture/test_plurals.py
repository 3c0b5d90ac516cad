"""One of a thing is not called "1 things": what is counted in a text goes through `counted`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "d2f"
THINGS = (
    "block byte character client digit example file forward GPU layer module pair parameter "
    "position problem prompt recipe request round row sample sequence step tensor token update"
)
COUNTED = re.compile(rf" (new )?({THINGS.replace(' ', '|')}|proces(?=ses))(s|ses)\b(?![/-])")
NEVER_ONE = {
    "cli/train.py": "processes",  # said of several only
    "training/run.py": "processes",
    "evaluation/report/claims.py": "problems",  # a constant
}


def counts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and noun of each f-string that puts a plural behind a value."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.JoinedStr):
            continue
        for value, text in zip(node.values, node.values[1:], strict=False):
            if not isinstance(value, ast.FormattedValue) or not isinstance(text, ast.Constant):
                continue
            found = COUNTED.match(str(text.value))
            form = ast.unparse(value.format_spec) if value.format_spec else ""
            if found and ".2f" not in form and "per" not in str(text.value).split()[:2]:
                yield value.lineno, found[0].split()[-1]


def test_it_finds_what_it_looks_for():
    assert list(counts(ast.parse("f'{n} forwards'; f'{n:,} new tokens in'; f'{n} tokens/s'"))) == [
        (1, "forwards"),
        (1, "tokens"),
    ]


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.stem)
def test_things_are_counted_in_words(path):
    name = path.relative_to(SOURCE).as_posix()
    if name.startswith("problems/"):
        return  # their numbers are drawn, and none is 1
    found = counts(ast.parse(path.read_text(encoding="utf-8")))
    assert [(line, noun) for line, noun in found if noun != NEVER_ONE.get(name)] == []
