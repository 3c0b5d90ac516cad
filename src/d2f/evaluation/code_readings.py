"""Find what of an answer may be its code: fenced blocks, and readings of what is not plain."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from d2f.evaluation.code_statements import Search, parse_or_refuse, split_lines

_FENCE_IN_A_LINE = re.compile(r"\s*```(?P<code>[^`]+)```\s*")
_LIST_MARKER = re.compile(r"[\s>]*(?:[-*+]|\d{1,9}[.)])?\s*")
"""The text that may stand before a fence without being a sentence."""
_QUOTE = re.compile(r"^\s*(?:>[ ]?)+")
_PYTHON = re.compile(r"\s*\{?\s*\.?(?:i?python\d*(?:\.\d+)?|py\d?)(?![\w-])", re.IGNORECASE)
_STRING_START = re.compile(r"(?:^\s*|[=(\[,:]\s*|\breturn\s+)[rRbBuUfF]{0,2}(?P<quotes>\"\"\"|''')")
"""A string of several lines in code. Prose holds three quotes in other places, if at all."""
_INDENT = 4


@dataclass(frozen=True)
class Piece:
    """Lines of an answer that are read together."""

    lines: tuple[str, ...]
    closed: bool
    """Whether something ends it, and not only the end of the answer."""
    language: str | None = field(default=None, compare=False)
    """The text behind the marks of the piece's fence, maybe empty; None: there is no fence."""

    @property
    def first(self) -> int | None:
        """The number of its first line of code."""
        lines = enumerate(self.lines)
        return next((i for i, text in lines if text.strip() and text.strip()[0] != "#"), None)

    @property
    def indent(self) -> int:
        """The width of the margin before its first line of code."""
        return 0 if self.first is None else _margin(self.lines[self.first])

    def moved(self, indent: int) -> Piece:
        """Move it so that it begins at an indentation."""
        more = indent - self.indent
        if more >= 0:
            lines = (" " * more + line if line.strip() else line for line in self.lines)
        else:
            lines = (line[min(-more, _margin(line)) :] for line in self.lines)
        return replace(self, lines=tuple(lines))

    def first_moved(self, indent: int) -> Piece:
        """Move its first line alone to an indentation."""
        lines = list(self.lines)
        if self.first is not None:
            lines[self.first] = " " * indent + lines[self.first].lstrip()
        return replace(self, lines=tuple(lines))

    def without_tabs(self) -> Piece:
        """Put spaces in place of tabs before the code of each line."""
        margins = (line[: _margin(line)].replace("\t", " " * _INDENT) for line in self.lines)
        lines = (margin + line.lstrip() for margin, line in zip(margins, self.lines, strict=True))
        return replace(self, lines=tuple(lines))


Reading = tuple[Piece, ...]
"""Pieces that Python would execute one after the other."""


def readings(lines: Sequence[str], prompt: str, search: Search) -> Iterator[Reading]:
    """List the readings of an answer as code, the most literal first."""
    if isinstance(parse_or_refuse(lines), ast.Module):
        yield (Piece(tuple(lines), closed=False),)  # so marks of fences are in strings
    indent = _body_indent(prompt)
    for strings in (True, False):
        plain = list(_choices(split_blocks(lines, strings=strings)))
        yield from plain
        yield from (tuple(piece.without_tabs() for piece in pieces) for pieces in plain)
        for pieces in plain:
            yield from _moved_bodies(pieces, indent, search)


def _choices(blocks: Sequence[Piece]) -> Iterator[Reading]:
    """List the blocks that may be the program: Python's, those of no language, all, the text."""
    named = [block for block in blocks if _PYTHON.match(block.language or "")]
    bare = [block for block in blocks if block in named or block.language == ""]
    fenced = [block for block in blocks if block.language is not None]
    # The text before the fences counts if it goes on with the prompt's function.
    start = [block for block in blocks[:1] if block.language is None and block.indent > 0]
    yield from ((*start, *chosen) for chosen in (named, bare, fenced) if chosen)
    if blocks:
        yield tuple(blocks)


def _moved_bodies(pieces: Reading, indent: int, search: Search) -> Iterator[Reading]:
    """Put the body of the prompt's function back to where it belongs."""
    found = [search.find(piece.moved(0).lines, closed=piece.closed) for piece in pieces]
    bodies = [i for i, statements in enumerate(found) if any(s.is_stray for s in statements)]
    number = bodies[-1] if bodies else 0
    body = pieces[number]
    # Some tokenizers begin an answer with a space.
    left, first, whole = body.first_moved(0), body.first_moved(indent), body.moved(indent)
    # With no `return`, to move too little shows less than to move too much.
    for changed in (left, first, whole) if bodies else (left, whole, first):
        yield (*pieces[:number], changed, *pieces[number + 1 :])


def _body_indent(prompt: str) -> int:
    """Give the indentation of the body of the prompt's last function."""
    for statement in reversed(Search().find(split_lines(prompt))):
        if isinstance(statement.node, ast.FunctionDef | ast.AsyncFunctionDef):
            return statement.node.body[0].col_offset
    return _INDENT


def split_blocks(lines: Sequence[str], *, strings: bool = True) -> list[Piece]:
    """Split an answer at its fences.

    A fence may stand in a list or a quotation, be made of backticks or tildes, and end with the
    answer. One that names a language ends a fence that is still open. With `strings`, marks in a
    string of several lines, such as a docstring, are its text. That is misled by a string that is
    cut off; without it, a docstring may end a fence.

    Example:
        >>> [(b.lines, b.language) for b in split_blocks(["So:", "```py", "x = 1", "```"])]
        [(('So:',), None), (('x = 1',), 'py')]
    """
    blocks: list[Piece] = []
    fence: _Fence | None = None
    held: list[str] = []

    def end(closed: bool) -> None:
        if fence is not None:
            body = (_QUOTE.sub("", line) if fence.quoted else line for line in held)
            blocks.append(Piece(tuple(body), closed, fence.info))
        elif any(line.strip() for line in held):
            blocks.append(Piece(tuple(held), closed))
        held.clear()

    for line, is_text in _with_strings(lines, strings):
        opening = None if is_text else _opening(line)
        if is_text:
            held.append(line)
        elif fence is not None and (before := _closing(line, fence.mark)) is not None:
            held += [before] if before.strip() else []
            end(True)
            fence = None
        elif opening is not None and (fence is None or (opening.info and not opening.before)):
            held += [opening.before] if opening.before else []
            end(True)
            fence = opening
        elif fence is None and (inside := _FENCE_IN_A_LINE.fullmatch(line)) is not None:
            end(True)
            named = _PYTHON.match(inside["code"])
            code = inside["code"][named.end() if named else 0 :]
            blocks.append(Piece((code.strip(),), True, "python" if named else ""))
        else:
            held.append(line)
    end(False)
    return blocks


class _Fence(NamedTuple):
    mark: str
    info: str
    before: str
    """The text before the fence in its line, if that is more than a list's marker."""
    quoted: bool
    """Whether it stands in a quotation, whose every line begins with a mark."""


def _opening(line: str) -> _Fence | None:
    for character in "`~":
        found = line.rfind(3 * character)
        info = line[found + 3 :].strip()
        if found < 0 or character in info:
            continue
        before = line[:found].rstrip(character)
        mark = line[len(before) : found + 3]
        if _LIST_MARKER.fullmatch(before):
            return _Fence(mark, info, "", ">" in before)
        named = not info or _PYTHON.fullmatch(info)
        if named and character == "`" and 3 * character not in before:
            return _Fence(mark, info, before, False)
    return None


def _closing(line: str, mark: str) -> str | None:
    """Give the text before a fence's end in its line; None if the line does not end it."""
    bare = line.strip()
    if len(bare) >= len(mark) and not bare.strip(mark[0]):
        return ""
    end = line.rstrip()
    before = end.removesuffix(mark)
    return before if before != end and mark[0] == "`" and "`" not in before else None


def _with_strings(lines: Sequence[str], strings: bool) -> Iterator[tuple[str, bool]]:
    """Each line, and whether it begins inside a string."""
    inside_until = 0
    for index, line in enumerate(lines):
        yield line, index < inside_until
        if strings and index >= inside_until and (start := _STRING_START.search(line)) is not None:
            quotes = start["quotes"]
            if quotes not in line[start.end() :]:
                later = range(index + 1, len(lines))
                inside_until = next((i + 1 for i in later if quotes in lines[i]), 0)


def _margin(line: str) -> int:
    return len(line) - len(line.lstrip())
