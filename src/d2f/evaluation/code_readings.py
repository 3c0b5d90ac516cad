"""The readings of an answer: which of its text is code, where that is not plain."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from d2f.evaluation.code_fences import Block, split_blocks
from d2f.evaluation.code_statements import Search, find_statements, parse_or_refuse, split_lines

_INDENT = 4


@dataclass(frozen=True)
class Piece:
    """A part of an answer that is read by itself."""

    lines: tuple[str, ...]
    closed: bool

    @property
    def first(self) -> int | None:
        """The number of its first line of code."""
        lines = enumerate(self.lines)
        return next((i for i, text in lines if text.strip() and text.strip()[0] != "#"), None)

    @property
    def indent(self) -> int:
        """The width of the margin before its first line of code."""
        if self.first is None:
            return 0
        line = self.lines[self.first]
        return len(line) - len(line.lstrip())


Reading = tuple[Piece, ...]
"""Pieces that Python would execute one after the other."""


def readings(lines: Sequence[str], prompt: str, search: Search) -> Iterator[Reading]:
    """What of an answer may be its code, the most literal first, and none twice.

    Args:
        lines: The answer.
        prompt: What it may go on with.
        search: Of statements in the answer.
    """
    seen: set[Reading] = set()
    for reading in _all_readings(lines, prompt, search):
        if reading not in seen:
            seen.add(reading)
            yield reading


def _all_readings(lines: Sequence[str], prompt: str, search: Search) -> Iterator[Reading]:
    if isinstance(parse_or_refuse(lines), ast.Module):
        yield (Piece(tuple(lines), closed=False),)  # so marks of fences are in strings
    indent = _body_indent(prompt)
    for strings in (True, False):
        plain = list(_choices(split_blocks(lines, strings=strings)))
        yield from plain
        for pieces in plain:
            yield tuple(map(_tabs_as_spaces, pieces))
        for pieces in plain:
            yield from _moved_bodies(pieces, indent, search)


def _choices(blocks: Sequence[Block]) -> Iterator[Reading]:
    """The blocks that may be the program: Python's, those of no language, all, and the text."""
    fenced = [block for block in blocks if block.language is not None]
    named = [block for block in fenced if block.is_python]
    bare = [block for block in fenced if block.is_python or not block.language]
    for chosen in (named, bare, fenced):
        if chosen:
            yield tuple(map(_piece, _with_continuation(blocks, chosen)))
    if blocks:
        yield tuple(map(_piece, blocks))


def _moved_bodies(pieces: Reading, indent: int, search: Search) -> Iterator[Reading]:
    """With the body of the prompt's function at the place that it has lost."""
    bodies = [number for number, piece in enumerate(pieces) if _has_strays(piece, search)]
    number = bodies[-1] if bodies else 0
    changes = [_first_moved_left, _first_moved, moved]
    if not bodies:  # with no `return`, to move too little shows less than to move too much
        changes = [_first_moved_left, moved, _first_moved]
    for change in changes:
        yield (*pieces[:number], change(pieces[number], indent), *pieces[number + 1 :])


def _piece(block: Block) -> Piece:
    return Piece(block.lines, block.closed)


def _with_continuation(blocks: Sequence[Block], chosen: Sequence[Block]) -> list[Block]:
    """The chosen blocks, and the text before them if it goes on with the prompt's function."""
    first = blocks[0]
    goes_on = first.language is None and _piece(first).indent > 0
    return [first, *chosen] if goes_on else list(chosen)


def _has_strays(piece: Piece, search: Search) -> bool:
    statements = search.find(moved(piece, 0).lines, closed=piece.closed)
    return any(statement.is_stray for statement in statements)


def _tabs_as_spaces(piece: Piece) -> Piece:
    def spaced(line: str) -> str:
        code = line.lstrip(" \t")
        return line[: len(line) - len(code)].replace("\t", " " * _INDENT) + code

    return Piece(tuple(map(spaced, piece.lines)), piece.closed)


def _first_moved_left(piece: Piece, indent: int) -> Piece:
    """With the first line at the margin: some tokenizers begin an answer with a space."""
    lines = list(piece.lines)
    if piece.first is not None:
        lines[piece.first] = lines[piece.first].lstrip()
    return Piece(tuple(lines), piece.closed)


def moved(piece: Piece, indent: int) -> Piece:
    """A body that begins where the prompt's function has it."""
    more = indent - piece.indent
    if more >= 0:
        lines = tuple(" " * more + line if line.strip() else line for line in piece.lines)
    else:
        lines = tuple(line[min(-more, len(line) - len(line.lstrip())) :] for line in piece.lines)
    return Piece(lines, piece.closed)


def _first_moved(piece: Piece, indent: int) -> Piece:
    """A body whose first line alone has lost its indentation."""
    lines = list(piece.lines)
    if piece.first is not None:
        lines[piece.first] = " " * indent + lines[piece.first].lstrip()
    return Piece(tuple(lines), piece.closed)


def _body_indent(prompt: str) -> int:
    """Where the body of the prompt's last function stands."""
    for statement in reversed(find_statements(split_lines(prompt))):
        if statement.is_function:
            return int(statement.node.body[0].col_offset)  # type: ignore[attr-defined]
    return _INDENT
