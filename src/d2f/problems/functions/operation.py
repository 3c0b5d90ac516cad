"""Operations: the steps of which functions consist, each with its Python code and wordings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TYPES = ("ints", "int", "strs", "str", "bool")
"""Names of the types list[int], int, list[str], str and bool."""


@dataclass(frozen=True, slots=True)
class Argument:
    """The kind of argument that an operation takes beside the value it works on.

    Example:
        >>> Argument.parse("int 2 9")
        Argument(kind='int', low=2, high=9)
    """

    kind: str
    """`int`, `letter`: a constant or a parameter; `sep`: a constant; `ints`, `str`: a parameter."""
    low: int = 0
    high: int = 0
    """Largest number; `low` and `high` are both included."""

    @classmethod
    def parse(cls, text: str) -> Argument:
        """Parse a kind and, for numbers, the range."""
        kind, *span = text.split()
        return cls(kind, *map(int, span))

    @property
    def can_be_constant(self) -> bool:
        """Whether the code may contain the argument as a constant."""
        return self.kind in ("int", "letter", "sep")

    @property
    def can_be_parameter(self) -> bool:
        """Whether the argument may be a parameter of the function."""
        return self.kind != "sep"


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """A function of a value, with its code and its wordings.

    The template of the code has the slots `{v}` (variable of the value), `{o}` (variable of the
    result) and `{k}` (argument); wordings have `{it}`, `{them}` or `{each}` (value) and `{k}`.

    Example:
        >>> step = define("ints", "int", "total", "sum", "{o} = sum({v})", "the sum of {them}")
        >>> step.apply([1, 2], None)
        3
    """

    id: str
    """Unique id of the type that it takes and its name, such as `ints.sum`."""
    takes: str
    gives: str
    code: str
    texts: tuple[str, ...]
    """Wordings: imperative clauses, or noun phrases that begin with the, a, whether or how."""
    out: str
    """Variable of the result; empty: the variable of the value."""
    tag: str
    """Short word for the names of functions."""
    argument: Argument | None
    apply: Callable[[Any, Any], Any]
    """The code as a function of value and argument; it raises where the step is not defined."""


def define(
    takes: str, gives: str, out: str, name: str, code: str, *texts: str, arg: str = ""
) -> Operation:
    """Build an operation, whose `apply` is compiled from its code.

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
