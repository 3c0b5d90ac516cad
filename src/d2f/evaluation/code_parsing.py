"""Find the statements in a text that is Python in part.

No function here raises for any text.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from d2f.evaluation.code_statements import BUILTINS, Statement

MAX_CHARACTERS = 100_000
"""Of a longer text only the start is looked at; the longest answers have some 4,000."""
MAX_LINES = 2_000
_MAX_PARSED_LINES = 30_000


@dataclass(frozen=True)
class Refusal:
    """The line at which Python refused a text."""

    line: int
    """How many lines may parse: those before the one that is refused."""
    at_end: bool
    """Whether the text may be the beginning of one that parses."""


def split_lines(text: str) -> list[str]:
    """Split a text into lines as Python counts them; `splitlines` knows more ends of lines."""
    text = text[:MAX_CHARACTERS].replace("\r\n", "\n").replace("\r", "\n")
    return text.split("\n")[:MAX_LINES]


def parse_or_refuse(lines: Sequence[str]) -> ast.Module | Refusal:
    """Parse lines, or tell the line at which Python refused them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in strings
            return ast.parse("\n".join(lines))
    except SyntaxError as error:
        # At the end of the text Python may name a line behind it.
        line = min(max((error.lineno or 1) - 1, 0), len(lines) - 1)
        open_still = "never closed" in error.msg or "unterminated triple" in error.msg
        at_end = open_still or not any(text.strip() for text in lines[line + 1 :])
        return Refusal(line, at_end)
    except (ValueError, MemoryError, RecursionError, OverflowError, SystemError):
        return Refusal(len(lines) // 2, False)  # too deep, and nobody says where


class Search:
    """Finds statements in several forms of one text.

    A text made to be slow ends it: only so many lines are parsed in all.
    """

    def __init__(self) -> None:
        self._room = _MAX_PARSED_LINES
        self._found: dict[tuple[tuple[str, ...], bool], list[Statement]] = {}

    @property
    def is_over(self) -> bool:
        """Tell whether nothing more is parsed."""
        return self._room <= 0

    def find(self, lines: Sequence[str], *, closed: bool) -> list[Statement]:
        """Find statements as `find_statements` does."""
        key = tuple(lines), closed
        if key not in self._found:
            self._found[key] = list(self._walk(lines, closed))
        return self._found[key]

    def _walk(self, lines: Sequence[str], closed: bool) -> Iterator[Statement]:
        lines = [line if is_readable(line) else "?" for line in lines]
        start = 0
        while start < len(lines) and not self.is_over:
            first = lines[start]
            if not first.strip() or first[0] in " \t\f":
                start += 1
                continue
            tree, stop, cut_off = self._longest_start(lines[start:])
            rest = next((line for line in lines[start + stop :] if line.strip()), "")
            encoded = [line.encode() for line in lines[start : start + stop]]
            # An indented rest belongs to the last statement.
            broken = tree.body[-1] if tree.body and rest[:1] in (" ", "\t") else None
            for node in tree.body:
                if node is not broken:
                    yield Statement(node, source_of(node, encoded))
                elif cut_off and not closed:
                    yield Statement(node, source_of(node, encoded), unfinished=True)
            start += max(stop, 1)

    def _longest_start(self, lines: Sequence[str]) -> tuple[ast.Module, int, bool]:
        """Parse as many lines from the first on as possible; tell if the text ends too early."""
        stop, cut_off = len(lines), None
        while stop > 0 and not self.is_over:
            tree = parse_or_refuse(lines[:stop])
            if isinstance(tree, ast.Module):
                self._room -= stop
                return tree, stop, bool(cut_off)
            # All lines were put together, even if the parser saw only the first of them.
            self._room -= stop if tree.at_end else tree.line + 1 + stop // 20
            cut_off = tree.at_end if cut_off is None else cut_off
            stop = tree.line
        return ast.Module(body=[], type_ignores=[]), 0, bool(cut_off)


def find_statements(lines: Sequence[str], *, closed: bool = True) -> list[Statement]:
    r"""Find the statements of the top level in a text, and leave out what is no Python.

    A statement that Python refuses is left out as a whole. Of one that the end of the text cuts
    off, what there is of it is taken.

    Args:
        lines: The text.
        closed: Whether the text is whole; else its end may be missing.

    Example:
        >>> [s.source for s in find_statements(["Sure (here:", "x = 1", "It's done.", "y = 2"])]
        ['x = 1', 'y = 2']
    """
    return Search().find(lines, closed=closed)


def source_of(node: ast.stmt, lines: Sequence[bytes]) -> str:
    """Give the text of a statement at the left margin, with its decorators; offsets count bytes."""
    decorators = getattr(node, "decorator_list", [])
    first = min(part.lineno for part in [node, *decorators]) - 1
    last = (node.end_lineno or node.lineno) - 1
    rows = list(lines[first : last + 1])
    rows[-1] = rows[-1][: node.end_col_offset]
    if not decorators:
        rows[0] = rows[0][node.col_offset :]
    return b"\n".join(rows).decode()


def is_readable(line: str) -> bool:
    """Tell whether a program can hold the line at all."""
    try:
        return b"\0" not in line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def names_read(source: str, without: Set[str] = BUILTINS) -> list[str]:
    r"""List the names that a program, such as a problem's tests, needs from elsewhere, sorted.

    Example:
        >>> names_read("import math\nassert math.floor(f(len('a'))) == 1")
        ['f']
    """
    statements = find_statements(split_lines(source))
    bound = {name for statement in statements for name in statement.binds}
    read = {name for statement in statements for name in statement.reads}
    return sorted(read - bound - without)
