"""Find the statements in a text that is Python in part, and what each needs and does.

No function here raises for any text.
"""

from __future__ import annotations

import ast
import builtins
import symtable
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

MAX_CHARACTERS = 100_000
"""Most characters that are looked at, from the start; the longest answers have some 4,000."""
_MAX_LINES = 2_000
_MAX_PARSED_LINES = 30_000

BUILTINS = frozenset(dir(builtins)) | {"__file__", "__name__"}
_NEVER_NEEDED = frozenset(("print", "input", "help", "exit", "quit", "breakpoint"))
_SETTINGS = ("set", "seed", "simplefilter", "filterwarnings", "stack_size")
_FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
_IMPORT = ast.Import | ast.ImportFrom
_INSIDE_ALONE = (ast.Return, ast.Yield, ast.YieldFrom, ast.Await, ast.AsyncFor, ast.AsyncWith)


def names_in(*nodes: ast.AST | None) -> set[str]:
    """Collect the names that stand somewhere in nodes of a program."""
    parts = (part for node in nodes if node is not None for part in ast.walk(node))
    return {part.id for part in parts if isinstance(part, ast.Name)}


def _root(node: ast.AST) -> str:
    """Give the name that `a.b[1](2).c` begins with; empty if it begins with none."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Starred | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def reached(names: Set[str], links: Mapping[str, Set[str]]) -> set[str]:
    """Collect names and all that they lead to.

    Example:
        >>> sorted(reached({"a"}, {"a": {"b"}, "b": {"a", "c"}, "d": {"e"}}))
        ['a', 'b', 'c']
    """
    found: set[str] = set()
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= links.get(name, frozenset()) - found
    return found


@dataclass(frozen=True, eq=False)
class Statement:
    """One statement of the top level.

    Example:
        >>> [first, second] = Search().find(["def f(x):", "    return x + N", "T[1] = f(2)"])
        >>> first.binds, sorted(first.reads), second.stores
        (frozenset({'f'}), ['N'], frozenset({'T'}))
    """

    node: ast.stmt
    source: str
    unfinished: bool = False
    """Whether its end is missing, since the text ends before."""

    @cached_property
    def _symbols(self) -> tuple[list[symtable.Symbol], list[symtable.Symbol]]:
        """Symbols of the top level and of all inner scopes; none where Python refuses so late."""
        try:
            top = symtable.symtable(self.source, "<answer>", "exec")
            tables = list(top.get_children())
            for table in tables:
                tables += table.get_children()
        except (SyntaxError, ValueError, RecursionError, MemoryError, SystemError):
            return [], []
        return top.get_symbols(), [symbol for table in tables for symbol in table.get_symbols()]

    @cached_property
    def binds(self) -> frozenset[str]:
        """Names of the top level that it gives a value."""
        if isinstance(self.node, ast.AnnAssign) and self.node.value is None:
            return frozenset()
        given = (s for s in self._symbols[0] if s.is_assigned() or s.is_imported())
        return frozenset(symbol.get_name() for symbol in given)

    @cached_property
    def reads_later(self) -> frozenset[str]:
        """Names of the top level that it uses in what it defines, which may be called later."""
        return frozenset(symbol.get_name() for symbol in self._symbols[1] if symbol.is_global())

    @cached_property
    def reads(self) -> frozenset[str]:
        """Names of the top level that it uses, when it runs or when what it defines is called."""
        used = {symbol.get_name() for symbol in self._symbols[0] if symbol.is_referenced()}
        if isinstance(self.node, ast.For):  # it gives its variables their values itself
            used -= names_in(self.node.target) - names_in(self.node.iter)
        return self.reads_later | used

    @cached_property
    def stores(self) -> frozenset[str]:
        """Names of the top level in whose objects it stores, as in `x[1] = 2` and `x.y += 1`."""
        inner = (s for s in self._symbols[1] if s.is_declared_global() and s.is_assigned())
        parts = (n for n in ast.walk(self.node) if isinstance(n, ast.Attribute | ast.Subscript))
        roots = {_root(part) for part in parts if not isinstance(part.ctx, ast.Load)}
        return (self.reads & roots).union(symbol.get_name() for symbol in inner)

    @cached_property
    def copies(self) -> set[str]:
        """Names whose objects, or parts of them, the names that it binds may stand for."""
        return names_in(getattr(self.node, "value", None), getattr(self.node, "iter", None))

    @cached_property
    def runs(self) -> frozenset[str]:
        """Names that it uses when it runs: of a definition, in its decorators and bases."""
        if not self.is_definition:
            return self.reads
        parts = getattr(self.node, "decorator_list", []) + getattr(self.node, "bases", [])
        return self.reads & names_in(*parts)

    @property
    def is_import(self) -> bool:
        """Whether it is an import by itself."""
        return isinstance(self.node, _IMPORT)

    @property
    def is_future(self) -> bool:
        """Whether it is an import that must come first."""
        return isinstance(self.node, ast.ImportFrom) and self.node.module == "__future__"

    @property
    def is_definition(self) -> bool:
        """Whether it defines a function, a class, or what others have defined."""
        return isinstance(self.node, _FUNCTION | ast.ClassDef | _IMPORT)

    @property
    def is_standard(self) -> bool:
        """Whether it imports nothing but the standard library."""
        if isinstance(self.node, ast.Import):
            modules = [alias.name for alias in self.node.names]
        elif isinstance(self.node, ast.ImportFrom) and not self.node.level:
            modules = [self.node.module or ""]
        else:
            return False
        return all(name.partition(".")[0] in sys.stdlib_module_names for name in modules)

    @cached_property
    def is_stub(self) -> bool:
        """Whether it defines a function that does nothing yet, or not all that it should."""
        if self.unfinished or not isinstance(self.node, _FUNCTION):
            return self.unfinished
        return not self.node.decorator_list and all(map(_does_nothing, self.node.body))

    @cached_property
    def is_stray(self) -> bool:
        """Whether it belongs into a function, as a `return` does."""
        waiting: list[ast.AST] = [self.node]
        while waiting:
            node = waiting.pop()
            if isinstance(node, _INSIDE_ALONE):
                return True
            if not isinstance(node, _FUNCTION | ast.ClassDef | ast.Lambda):
                waiting += ast.iter_child_nodes(node)
        return False

    @property
    def call(self) -> ast.expr | None:
        """The function that the statement calls, if it is a call or names what a call returns."""
        value = getattr(self.node, "value", None)
        return value.func if isinstance(value, ast.Call) else None

    def is_always_needed(self, modules: Set[str]) -> bool:
        """Whether it sets something of the interpreter, as `sys.setrecursionlimit(9999)` does."""
        if self.is_import:
            return self.is_future or (self.is_standard and not self.binds)  # imports `*`
        name = getattr(self.call, "attr", getattr(self.call, "id", ""))
        expression = isinstance(self.node, ast.Expr)
        return expression and name.startswith(_SETTINGS) and bool(self.reads & modules)

    def is_example(self, wanted: Set[str]) -> bool:
        """Whether it only checks, shows, or asks, or is like `f = f(1)`."""
        if isinstance(self.node, ast.Expr) and self.call is not None:
            return _root(self.call) in _NEVER_NEEDED
        name = self.call.id if isinstance(self.call, ast.Name) else None
        return isinstance(self.node, ast.Assert) or name in self.binds & wanted


def _does_nothing(node: ast.stmt) -> bool:
    if isinstance(node, ast.Raise):
        return node.exc is not None and _root(node.exc) == "NotImplementedError"
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    return isinstance(node, ast.Pass | _IMPORT)


@dataclass(frozen=True)
class Refusal:
    """The line at which Python refused a text."""

    line: int
    """Number of lines that may parse: those before the one that is refused."""
    at_end: bool
    """Whether the text may be the beginning of one that parses."""


def split_lines(text: str) -> list[str]:
    """Split a text into lines as Python counts them; "?" is in place of one no program can hold.

    `splitlines` knows more ends of lines.
    """
    text = text[:MAX_CHARACTERS].replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")[:_MAX_LINES]
    # Half of a surrogate pair cannot be encoded.
    return [line if "\0" not in line and line == _encodable(line) else "?" for line in lines]


def _encodable(line: str) -> str:
    return line.encode("utf-8", "replace").decode()


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
        return Refusal(line, open_still or not any(text.strip() for text in lines[line + 1 :]))
    except (ValueError, MemoryError, RecursionError, OverflowError, SystemError):
        return Refusal(len(lines) // 2, False)  # too deep, and nobody says where


def source_of(node: ast.stmt, lines: Sequence[bytes]) -> str:
    """Give the text of a statement at the left margin, with its decorators; offsets count bytes."""
    decorators = getattr(node, "decorator_list", [])
    first = min(part.lineno for part in [node, *decorators]) - 1
    rows = list(lines[first : node.end_lineno or node.lineno])
    rows[-1] = rows[-1][: node.end_col_offset]
    if not decorators:
        rows[0] = rows[0][node.col_offset :]
    return b"\n".join(rows).decode()


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

    def find(self, lines: Sequence[str], *, closed: bool = True) -> list[Statement]:
        r"""Find the statements of the top level in a text, and leave out what is no Python.

        A statement that Python refuses is left out as a whole. Of one that the end of the text
        cuts off, what there is of it is taken; `closed` tells that the text is whole.

        Example:
            >>> lines = ["Sure (here:", "x = 1", "It's done.", "y = 2"]
            >>> [statement.source for statement in Search().find(lines)]
            ['x = 1', 'y = 2']
        """
        key = tuple(lines), closed
        if key not in self._found:
            self._found[key] = list(self._walk(lines, closed))
        return self._found[key]

    def _walk(self, lines: Sequence[str], closed: bool) -> Iterator[Statement]:
        start = 0
        while start < len(lines) and not self.is_over:
            first = lines[start]
            if not first.strip() or first[0] in " \t\f":
                start += 1
                continue
            body, stop, cut_off = self._longest_start(lines[start:])
            rest = next((line for line in lines[start + stop :] if line.strip()), "")
            encoded = [line.encode() for line in lines[start : start + stop]]
            # An indented rest belongs to the last statement.
            broken = body[-1] if body and rest[:1] in (" ", "\t") else None
            for node in body:
                if node is not broken or (cut_off and not closed):
                    yield Statement(node, source_of(node, encoded), unfinished=node is broken)
            start += max(stop, 1)

    def _longest_start(self, lines: Sequence[str]) -> tuple[list[ast.stmt], int, bool]:
        """Parse as many lines from the first on as possible; tell if the text ends too early."""
        stop, cut_off = len(lines), None
        while stop > 0 and not self.is_over:
            tree = parse_or_refuse(lines[:stop])
            if isinstance(tree, ast.Module):
                self._room -= stop
                return tree.body, stop, bool(cut_off)
            # All lines were put together, even if the parser saw only the first of them.
            self._room -= stop if tree.at_end else tree.line + 1 + stop // 20
            cut_off = tree.at_end if cut_off is None else cut_off
            stop = tree.line
        return [], 0, bool(cut_off)


def names_read(source: str, without: Set[str] = BUILTINS) -> list[str]:
    r"""List the names that a program, such as a problem's tests, needs from elsewhere, sorted.

    Example:
        >>> names_read("import math\nassert math.floor(f(len('a'))) == 1")
        ['f']
    """
    statements = Search().find(split_lines(source))
    bound = {name for statement in statements for name in statement.binds}
    return sorted({name for s in statements for name in s.reads} - bound - without)
