"""Find what of an answer may be its code: fenced blocks, and readings of what is not plain."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from d2f.evaluation.code_parsing import Search, find_statements, parse_or_refuse, split_lines

_LIST_MARKER = re.compile(r"[\s>]*(?:[-*+]|\d{1,9}[.)])?\s*")
"""What may stand before a fence without being a sentence."""
_QUOTE = re.compile(r"^\s*(?:>[ ]?)+")
_PYTHON = re.compile(r"\s*\{?\s*\.?(?:i?python\d*(?:\.\d+)?|py\d?)(?![\w-])", re.IGNORECASE)
_STRING_START = re.compile(r"(?:^\s*|[=(\[,:]\s*|\breturn\s+)[rRbBuUfF]{0,2}(?P<quotes>\"\"\"|''')")
"""A string of several lines in code. Prose holds three quotes in other places, if at all."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Lines of an answer that belong together.

    Example:
        >>> [block.lines for block in split_blocks(["So:", "```py", "x = 1", "```"])]
        [('So:',), ('x = 1',)]
    """

    lines: tuple[str, ...]
    language: str | None
    """What the fence says behind its marks, "" if nothing; None: the block is no fenced one."""
    closed: bool
    """Whether something ends it, and not only the end of the answer."""

    @property
    def is_python(self) -> bool:
        """Tell whether its fence names Python."""
        return self.language is not None and _PYTHON.match(self.language) is not None


def split_blocks(lines: Sequence[str], *, strings: bool = True) -> list[Block]:
    """Split an answer at its fences.

    A fence may stand in a list, be made of backticks or tildes, and end with the answer. One that
    names a language ends a fence that is still open.

    Args:
        lines: The answer.
        strings: Take marks in a string of several lines, such as a docstring, for its text. That is
            misled by a string that is cut off; without it, a docstring may end a fence.

    Example:
        >>> [(b.language, b.closed) for b in split_blocks(["1. ```Python", "   x = 1"])]
        [('Python', False)]
    """
    blocks: list[Block] = []
    fence: _Fence | None = None
    held: list[str] = []

    def end(closed: bool) -> None:
        if fence is not None:
            lines = [_QUOTE.sub("", line) for line in held] if fence.quoted else held
            body = tuple(_without_margin(lines, fence.column))
            blocks.append(Block(lines=body, language=fence.info, closed=closed))
        elif any(line.strip() for line in held):
            blocks.append(Block(lines=tuple(held), language=None, closed=closed))
        held.clear()

    for line, is_text in _with_strings(lines, strings):
        opening = None if is_text else _opening(line)
        if is_text:
            held.append(line)
        elif fence is not None and (before := _closing(line, fence)) is not None:
            held += [before] if before.strip() else []
            end(True)
            fence = None
        elif opening is not None and (fence is None or (opening.info and not opening.before)):
            held += [opening.before] if opening.before else []
            end(True)
            fence = opening
        elif fence is None and (inside := _fence_in_a_line(line)) is not None:
            end(True)
            blocks.append(inside)
        else:
            held.append(line)
    end(False)
    return blocks


@dataclass(frozen=True, kw_only=True)
class _Fence:
    mark: str
    info: str
    before: str
    """What stands before it in its line, if that is more than a list's marker."""
    column: int
    quoted: bool = False
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
            quoted = ">" in before
            column = 0 if quoted else len(before)
            return _Fence(mark=mark, info=info, before="", column=column, quoted=quoted)
        named = _PYTHON.match(info)
        bare = named is not None and named.end() == len(info)
        if character == "`" and 3 * character not in before and (not info or bare):
            return _Fence(mark=mark, info=info, before=before, column=0)
    return None


def _closing(line: str, fence: _Fence) -> str | None:
    """Give the text before a fence's end in its line; None if the line does not end it."""
    bare = line.strip()
    if len(bare) >= len(fence.mark) and not bare.strip(fence.mark[0]):
        return ""
    end = line.rstrip()
    before = end.removesuffix(fence.mark)
    alone = before != end and fence.mark[0] not in before
    return before if alone and fence.mark[0] == "`" else None


def _fence_in_a_line(line: str) -> Block | None:
    bare = line.strip()
    inside = bare[3:-3]
    if len(bare) < 7 or bare[:3] != "```" or bare[-3:] != "```" or "`" in inside:
        return None
    named = _PYTHON.match(inside)
    code = inside[named.end() :] if named else inside
    return Block(lines=(code.strip(),), language="python" if named else "", closed=True)


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


def _without_margin(lines: Sequence[str], column: int) -> Iterator[str]:
    """Lines without the indentation of their fence, if they have it."""
    first = next((line for line in lines if line.strip()), "")
    if len(first) - len(first.lstrip()) < column:
        column = 0
    for line in lines:
        margin = len(line) - len(line.lstrip())
        yield line[min(column, margin) :]


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
    """List the readings of an answer as code, the most literal first, and none twice."""
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
    """List the blocks that may be the program: Python's, those of no language, all, the text."""
    fenced = [block for block in blocks if block.language is not None]
    named = [block for block in fenced if block.is_python]
    bare = [block for block in fenced if block.is_python or not block.language]
    for chosen in (named, bare, fenced):
        if chosen:
            yield tuple(map(_piece, _with_continuation(blocks, chosen)))
    if blocks:
        yield tuple(map(_piece, blocks))


def _moved_bodies(pieces: Reading, indent: int, search: Search) -> Iterator[Reading]:
    """Put the body of the prompt's function back to where it belongs."""
    bodies = [number for number, piece in enumerate(pieces) if _has_strays(piece, search)]
    number = bodies[-1] if bodies else 0
    body = pieces[number]
    # Some tokenizers begin an answer with a space.
    left, first, whole = _first_moved(body, 0), _first_moved(body, indent), moved(body, indent)
    # With no `return`, to move too little shows less than to move too much.
    for changed in (left, first, whole) if bodies else (left, whole, first):
        yield (*pieces[:number], changed, *pieces[number + 1 :])


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


def moved(piece: Piece, indent: int) -> Piece:
    """Move a piece so that it begins at an indentation."""
    more = indent - piece.indent
    if more >= 0:
        lines = tuple(" " * more + line if line.strip() else line for line in piece.lines)
    else:
        lines = tuple(line[min(-more, len(line) - len(line.lstrip())) :] for line in piece.lines)
    return Piece(lines, piece.closed)


def _first_moved(piece: Piece, indent: int) -> Piece:
    """Move the first line alone to an indentation."""
    lines = list(piece.lines)
    if piece.first is not None:
        lines[piece.first] = " " * indent + lines[piece.first].lstrip()
    return Piece(tuple(lines), piece.closed)


def _body_indent(prompt: str) -> int:
    """Give the indentation of the body of the prompt's last function."""
    for statement in reversed(find_statements(split_lines(prompt))):
        if statement.is_function:
            return int(statement.node.body[0].col_offset)  # type: ignore[attr-defined]
    return _INDENT
