"""A statement of the top level, and what it needs and does: names it binds, reads and changes."""

from __future__ import annotations

import ast
import builtins
import symtable
import sys
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cached_property

BUILTINS = frozenset(dir(builtins)) | {"__file__", "__name__"}
_CHANGING_BUILTINS = frozenset(("delattr", "exec", "next", "setattr"))
_HARMLESS_METHODS = frozenset(
    (*dir(str), *dir(tuple), *dir(frozenset), "get", "items", "keys", "values")
)
"""Those that leave their object as it is: of types that nothing can change, and of a dict."""
_PASSING_ON = frozenset(("enumerate", "iter", "reversed", "sorted", "zip"))
"""Those that give what is in their arguments."""
_NEVER_NEEDED = frozenset(("print", "input", "help", "exit", "quit", "breakpoint"))

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_INSIDE_ALONE = (ast.Return, ast.Yield, ast.YieldFrom, ast.Await, ast.AsyncFor, ast.AsyncWith)


@dataclass(frozen=True, eq=False)
class Statement:
    """One statement of the top level.

    Example:
        >>> from d2f.evaluation.code_parsing import find_statements
        >>> [first, second] = find_statements(["def f(x):", "    return x + N", "T[1] = f(2)"])
        >>> first.binds, sorted(first.reads), second.stores
        (frozenset({'f'}), ['N'], frozenset({'T'}))
    """

    node: ast.stmt
    source: str
    unfinished: bool = False
    """Whether its end is missing, since the text ends before."""

    @cached_property
    def _tables(self) -> list[symtable.SymbolTable]:
        """Its scopes, the top level's first; none where Python refuses it later than in parsing."""
        try:
            found = [symtable.symtable(self.source, "<answer>", "exec")]
            for table in found:
                found += table.get_children()
        except (SyntaxError, ValueError, RecursionError, MemoryError, SystemError):
            return []
        return found

    @cached_property
    def binds(self) -> frozenset[str]:
        """Names of the top level that it gives a value."""
        if isinstance(self.node, ast.AnnAssign) and self.node.value is None:
            return frozenset()
        symbols = (symbol for table in self._tables[:1] for symbol in table.get_symbols())
        return frozenset(s.get_name() for s in symbols if s.is_assigned() or s.is_imported())

    @cached_property
    def reads(self) -> frozenset[str]:
        """Names of the top level that it uses, when it runs or when what it defines is called."""
        top = (symbol for table in self._tables[:1] for symbol in table.get_symbols())
        inner = (symbol for table in self._tables[1:] for symbol in table.get_symbols())
        used = {symbol.get_name() for symbol in top if symbol.is_referenced()} - self._counted
        return frozenset(used | {symbol.get_name() for symbol in inner if symbol.is_global()})

    @cached_property
    def _counted(self) -> set[str]:
        """The variables of a loop, which it gives their values itself."""
        if not isinstance(self.node, ast.For):
            return set()
        given, used = ast.walk(self.node.target), ast.walk(self.node.iter)
        names = {part.id for part in given if isinstance(part, ast.Name)}
        return names - {part.id for part in used if isinstance(part, ast.Name)}

    @cached_property
    def reads_at_once(self) -> frozenset[str]:
        """Those that it uses when it runs, and not only in what it defines."""
        symbols = (symbol for table in self._tables[:1] for symbol in table.get_symbols())
        at_once = {symbol.get_name() for symbol in symbols if symbol.is_referenced()}
        inner = (symbol for table in self._tables[1:] for symbol in table.get_symbols())
        return frozenset(at_once - {s.get_name() for s in inner if s.is_global()})

    @cached_property
    def stores(self) -> frozenset[str]:
        """Names of the top level in whose objects it stores, as in `x[1] = 2` and `x.y += 1`."""
        declared = {
            symbol.get_name()
            for table in self._tables[1:]
            for symbol in table.get_symbols()
            if symbol.is_declared_global() and symbol.is_assigned()
        }
        parts = (n for n in ast.walk(self.node) if isinstance(n, ast.Attribute | ast.Subscript))
        roots = {_root(part) for part in parts if not isinstance(part.ctx, ast.Load)}
        return self._read_objects(roots) | declared

    @cached_property
    def touches(self) -> frozenset[str]:
        """Names of the top level whose objects its calls may change."""
        names: set[str] = set()
        for call in ast.walk(self.node):
            if not isinstance(call, ast.Call):
                continue
            function = call.func
            if isinstance(function, ast.Attribute) and function.attr not in _HARMLESS_METHODS:
                names.add(_root(function.value))
            if isinstance(function, ast.Name) and function.id in BUILTINS - _CHANGING_BUILTINS:
                continue
            given = [*call.args, *(keyword.value for keyword in call.keywords)]
            names |= {argument.id for argument in given if isinstance(argument, ast.Name)}
        return self._read_objects(names)

    @cached_property
    def calls(self) -> frozenset[str]:
        """Names of the top level that it calls as they are."""
        functions = (part.func for part in ast.walk(self.node) if isinstance(part, ast.Call))
        return self.reads & {part.id for part in functions if isinstance(part, ast.Name)}

    def _read_objects(self, names: Set[str]) -> frozenset[str]:
        """What of the top level some of its names stand for, in functions too."""
        return self.reads & reached(names, self.same_objects)

    @cached_property
    def same_objects(self) -> dict[str, set[str]]:
        """Names that it gives objects of other names, or parts of them: `row` in `row = x[1]`."""
        found: dict[str, set[str]] = {}
        for part in ast.walk(self.node):
            if isinstance(part, ast.Assign):
                targets, value = part.targets, part.value
            elif isinstance(part, ast.For | ast.comprehension):
                targets, value = [part.target], part.iter
            elif isinstance(part, ast.AnnAssign | ast.NamedExpr) and part.value is not None:
                targets, value = [part.target], part.value
            else:
                continue
            values = [value]
            if isinstance(value, ast.Call) and _root(value) in _PASSING_ON:
                values = value.args
            inner = (name for target in targets for name in ast.walk(target))
            stored = (n for n in inner if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
            for name in stored:
                found.setdefault(name.id, set()).update(map(_object_of, values))
        return found

    @cached_property
    def runs(self) -> frozenset[str]:
        """Names that a definition calls when it runs: its decorators, and the classes it is of."""
        called = getattr(self.node, "decorator_list", []) + getattr(self.node, "bases", [])
        return frozenset(_root(part) for part in called) & self.reads

    @cached_property
    def registers_at(self) -> frozenset[str]:
        """Names whose methods decorate it, as `@table.register` does."""
        decorators = getattr(self.node, "decorator_list", [])
        return frozenset(_object_of(part) for part in decorators) & self.reads

    @property
    def is_function(self) -> bool:
        """Whether it defines a function."""
        return isinstance(self.node, _Function)

    @property
    def is_class(self) -> bool:
        """Whether it defines a class."""
        return isinstance(self.node, ast.ClassDef)

    @property
    def is_import(self) -> bool:
        """Whether it is an import by itself."""
        return isinstance(self.node, ast.Import | ast.ImportFrom)

    @property
    def is_future(self) -> bool:
        """Whether it is an import that must come first."""
        return isinstance(self.node, ast.ImportFrom) and self.node.module == "__future__"

    @property
    def is_definition(self) -> bool:
        """Whether it defines a function, a class, or what others have defined."""
        return isinstance(self.node, _Function | ast.ClassDef) or self.is_import

    @cached_property
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
        """Whether it defines a function that does nothing yet."""
        if not isinstance(self.node, _Function) or self.node.decorator_list:
            return False
        return all(_does_nothing(part) for part in self.node.body)

    @cached_property
    def is_stray(self) -> bool:
        """Whether it belongs into a function, as a `return` does."""
        waiting: list[ast.AST] = [self.node]
        while waiting:
            node = waiting.pop()
            if isinstance(node, _INSIDE_ALONE):
                return True
            if not isinstance(node, _Function | ast.ClassDef | ast.Lambda):
                waiting += ast.iter_child_nodes(node)
        return False

    @cached_property
    def is_setting(self) -> bool:
        """Whether it sets something of the interpreter, as `sys.setrecursionlimit(9999)` does."""
        if not isinstance(self.node, ast.Expr) or not isinstance(self.node.value, ast.Call):
            return False
        function = self.node.value.func
        name = function.attr if isinstance(function, ast.Attribute) else _root(function)
        return name.startswith(("set", "seed", "simplefilter", "filterwarnings", "stack_size"))

    @cached_property
    def is_never_needed(self) -> bool:
        """Whether it only checks, shows, or asks."""
        if isinstance(self.node, ast.Expr) and isinstance(self.node.value, ast.Call):
            return _root(self.node.value.func) in _NEVER_NEEDED
        return isinstance(self.node, ast.Assert)

    def is_result_of(self, names: set[str]) -> bool:
        """Whether it gives a function's name to what the function returns: `f = f(1)`."""
        value = getattr(self.node, "value", None)
        if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Name):
            return False
        return value.func.id in names and value.func.id in self.binds


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


def _root(node: ast.expr) -> str:
    """The name that `a.b[1](2).c` begins with; empty if it begins with none."""
    while True:
        if isinstance(node, ast.Attribute | ast.Subscript | ast.Starred):
            node = node.value
        elif isinstance(node, ast.Call):
            node = node.func
        else:
            return node.id if isinstance(node, ast.Name) else ""


def _object_of(node: ast.expr) -> str:
    """The name whose object, or a part of it, an expression may be; empty if there is none."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Starred | ast.Call):
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Attribute):
            return ""
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _does_nothing(node: ast.stmt) -> bool:
    if isinstance(node, ast.Raise):
        error = node.exc
        return error is not None and _root(error) == "NotImplementedError"
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    return isinstance(node, ast.Pass | ast.Import | ast.ImportFrom)
