"""Operation: one step of a function, with its line of Python and its wordings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["TYPES", "Argument", "Operation", "define"]

TYPES = ("ints", "int", "strs", "str", "bool")
"""list[int], int, list[str], str, bool."""


@dataclass(frozen=True, slots=True)
class Argument:
    """What a step needs besides the value it works on.

    Example:
        >>> Argument.parse("int 2 9")
        Argument(kind='int', low=2, high=9)
    """

    kind: str
    """`int`, `letter`: a constant or a parameter; `sep`: a constant; `ints`, `str`: a parameter."""
    low: int = 0
    high: int = 0
    """The range of numbers, ends included."""

    @classmethod
    def parse(cls, text: str) -> Argument:
        """Read a kind and, for numbers, the range."""
        kind, *span = text.split()
        return cls(kind, *map(int, span))

    @property
    def can_be_constant(self) -> bool:
        """Whether the value may stand in the code."""
        return self.kind in ("int", "letter", "sep")

    @property
    def can_be_parameter(self) -> bool:
        """Whether the caller may give the value."""
        return self.kind != "sep"


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """One step from a value to a value.

    Templates have the slots `{v}` (the variable with the value), `{o}` (that of the result) and
    `{k}` (the argument) in code; `{it}`, `{them}`, `{each}` (the value) and `{k}` in wordings.

    Example:
        >>> step = define("ints", "int", "total", "sum", "{o} = sum({v})", "the sum of {them}")
        >>> step.apply([1, 2], None)
        3
    """

    id: str
    """Takes and name, `ints.sum`: unique."""
    takes: str
    gives: str
    code: str
    texts: tuple[str, ...]
    """Imperative clauses, or what is returned where the text starts with the, whether or how."""
    out: str
    """The variable of the result; empty: the value's own."""
    tag: str
    """Short word for names of functions."""
    argument: Argument | None
    apply: Callable[[Any, Any], Any]
    """The code as a function of value and argument; it raises where the step is not defined."""


def define(
    takes: str, gives: str, out: str, name: str, code: str, *texts: str, arg: str = ""
) -> Operation:
    """Build an operation; what it computes is what its code says.

    Example:
        >>> define("int", "int", "", "double", "{o} = {v} * 2", "double {it}").apply(4, None)
        8
    """
    result = out or "v"
    lines = code.format(v="v", o=result, k="k").split("\n")
    body = "\n".join(f"    {line}" for line in lines)
    scope: dict[str, Any] = {}
    exec(f"def apply(v, k):\n{body}\n    return {result}\n", scope)
    return Operation(
        id=f"{takes}.{name}",
        takes=takes,
        gives=gives,
        code=code,
        texts=texts,
        out=out,
        tag=name,
        argument=Argument.parse(arg) if arg else None,
        apply=scope["apply"],
    )
