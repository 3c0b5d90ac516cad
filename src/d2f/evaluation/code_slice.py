"""Select the statements of an answer that some names need.

Everything that Python would execute is kept, in its order, but for what nobody needs: checks,
examples, what reads input or prints, a `main` and its call. So a statement stays if it gives a
needed name a value, or may change what such a name stands for; and then what it uses is needed too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from d2f.evaluation.code_statements import BUILTINS, Statement, reached

_LOOKUPS = frozenset(("eval", "exec", "globals", "vars"))


def needed_statements(statements: Sequence[Statement], wanted: Iterable[str]) -> list[Statement]:
    """Select the statements that the wanted names need, in order.

    Example:
        >>> from d2f.evaluation.code_parsing import (find_statements)
        >>> lines = ["T = {}", "def f(x):", "    return T[x]", "T[1] = 2", "print(f(0))"]
        >>> [s.source for s in needed_statements(find_statements(lines), ["f"])][::2]
        ['T = {}', 'T[1] = 2']
    """
    wanted = set(wanted)
    statements = _without_stubs(statements)
    elsewhere = {name for s in statements if not s.is_import for name in s.binds}
    defined = {name for s in statements if s.is_definition for name in s.binds & elsewhere}
    standard = {name for s in statements if s.is_standard for name in s.binds}
    effects = _Effects(statements, wanted)
    results = {s for s in statements if s.is_never_needed or s.is_result_of(wanted)}
    bound = [i for i, s in enumerate(statements) if s.binds & wanted and s not in results]
    last = max(bound, default=0)
    candidates: dict[int, tuple[Statement, frozenset[str]]] = {}
    for index, statement in enumerate(statements):
        names = statement.binds
        if statement.is_import and not statement.is_standard:
            names -= elsewhere  # the answer itself, imported by its example
        if index > last and not statement.is_definition:
            names -= BUILTINS  # an example's variable
        if statement not in results:
            candidates[index] = statement, names | effects.of(statement)
    kept: set[int] = set()
    # Each name that is needed, up to which statement: what comes later changes nothing for one
    # that reads it when it runs.
    needed = dict.fromkeys(wanted, len(statements))
    while True:
        more = [
            index
            for index, (statement, names) in candidates.items()
            if index not in kept
            and (
                any(index < needed.get(name, 0) for name in names)
                or _is_always_needed(statement, standard)
            )
        ]
        if not more:
            return [statements[index] for index in sorted(kept)]
        kept.update(more)
        for index in more:
            statement = statements[index]
            # What looks names up when it runs may look up any of them.
            any_name = defined if statement.reads & _LOOKUPS else frozenset()
            for name in statement.reads | any_name:
                until = index if name in statement.reads_at_once else len(statements)
                needed[name] = max(until, needed.get(name, 0))


def missing_names(kept: Sequence[Statement], wanted: Iterable[str]) -> set[str]:
    """List the names that the statements and their callers use, and that have no value."""
    if any("*" in statement.source and statement.is_import for statement in kept):
        return set()
    bound = {name for statement in kept for name in statement.binds | statement.stores}
    return {name for s in kept for name in s.reads}.union(wanted) - bound - BUILTINS


def undefined_names(kept: Sequence[Statement], wanted: Iterable[str]) -> set[str]:
    """List the wanted names that have no value, or name a function that is not written yet."""
    last = {name: statement for statement in kept for name in statement.binds}
    return {n for n in wanted if n not in last or last[n].is_stub or last[n].unfinished}


def _is_always_needed(statement: Statement, modules: set[str]) -> bool:
    star = statement.is_standard and not statement.binds
    setting = statement.is_setting and bool(statement.reads & modules)
    return statement.is_future or setting or star


def _without_stubs(statements: Sequence[Statement]) -> list[Statement]:
    """Drop functions that end unfinished or do nothing where a whole one came before."""
    written: set[str] = set()
    kept = []
    for statement in statements:
        if statement.is_stub or statement.unfinished:
            if statement.binds & written:
                continue
        else:
            written |= statement.binds
        kept.append(statement)
    return kept


class _Effects:
    """The changes that statements make to other statements' variables when they run."""

    def __init__(self, statements: Sequence[Statement], wanted: set[str]) -> None:
        self._variables = {n for s in statements if not s.is_definition for n in s.binds}
        self._definitions: dict[str, list[Statement]] = {}
        self._classes = {n for s in statements if s.is_class for n in s.binds}
        self._imported = {n for s in statements if s.is_import for n in s.binds}
        self._same_objects: dict[str, set[str]] = {}
        for statement in statements:
            if not statement.is_definition:
                for name, others in statement.same_objects.items():
                    self._same_objects.setdefault(name, set()).update(others)
            if statement.is_definition and not statement.is_import:
                for name in statement.binds - wanted:  # to call a wanted one is an example
                    self._definitions.setdefault(name, []).append(statement)

    def of(self, statement: Statement) -> frozenset[str]:
        """List names whose objects a statement may change, itself or by functions that it uses."""
        if statement.is_definition:  # its decorators may make it known to others
            found = set(statement.registers_at - self._imported)
            waiting, changeable = self._called(statement.runs), self._variables | self._classes
        else:
            found, waiting = set(statement.stores), {statement}
            changeable = self._variables  # a method of a class is called by examples
        seen: set[Statement] = set()
        while waiting:
            here = waiting.pop()
            seen.add(here)
            found |= here.stores | (here.touches & changeable)
            for name in here.calls:  # as `add = table.append` makes one
                found |= self._same_objects.get(name, frozenset())
            waiting |= self._called(here.reads) - seen
        others = reached(found, self._same_objects) & self._variables
        return frozenset(found | others)

    def _called(self, names: Iterable[str]) -> set[Statement]:
        """Find the definitions of some names."""
        return {statement for name in names for statement in self._definitions.get(name, ())}
