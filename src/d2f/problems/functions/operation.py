"""Operations: the steps of which functions consist, each with its Python code and wordings.

They are written down in `operations.txt`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TYPES = ("ints", "int", "strs", "str", "bool")
"""Names of the types list[int], int, list[str], str and bool."""


@dataclass(frozen=True, slots=True)
class Argument:
    """The kind of argument that an operation takes beside the value it works on."""

    kind: str
    """`int`, `letter`: a constant or a parameter; `sep`: a constant; `ints`, `str`: a parameter."""
    low: int = 0
    high: int = 0
    """Largest number; `low` and `high` are both included."""

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

    Example:
        >>> OPERATIONS["ints.sum"].code, OPERATIONS["ints.sum"].apply([1, 2], None)
        ('total = sum({v})', 3)
    """

    id: str
    """The type that it takes and its tag, such as `ints.sum`."""
    takes: str
    gives: str
    tag: str
    """Short word for the names of functions, unique among the operations of a type."""
    argument: Argument | None
    code: str
    """Template with the slots `{v}` (variable of the value) and `{k}` (argument)."""
    texts: tuple[str, ...]
    """Wordings with the slots `{it}`, `{them}` or `{each}` (value) and `{k}`."""
    out: str
    """Variable of the result; empty: the variable of the value."""
    apply: Callable[[Any, Any], Any]
    """The code as a function of value and argument; it raises where the step is not defined."""


def _compiled(code: str, result: str) -> Callable[[Any, Any], Any]:
    body = code.format(v="v", k="k").replace("\n", "\n    ")
    scope: dict[str, Any] = {}
    exec(f"def apply(v, k):\n    {body}\n    return {result}\n", scope)
    return scope["apply"]


def _read(text: str) -> Iterator[Operation]:
    """Read the catalogue, in which each entry begins at the margin."""
    takes = gives = ""
    for head, *rest in (entry.splitlines() for entry in re.split(r"\n+(?=\S)", text)):
        if head.startswith("["):
            takes, gives = head.strip("[]").split(" -> ")
        if head.startswith(("[", "#")):
            continue
        name, code = head.split(": ", 1)
        tag, _, argument = name.rstrip(")").partition(" (")
        kind, *span = argument.split() or [""]
        lines = [line.strip() for line in rest]
        code = "\n".join([code, *(line[2:] for line in lines if line.startswith("> "))])
        texts = " ".join(line for line in lines if not line.startswith("> ")).split(" | ")
        assigned = re.match(r" *(\w*)", code.rpartition("\n")[2])
        out = assigned[1] if assigned else ""
        yield Operation(
            id=f"{takes}.{tag}",
            takes=takes,
            gives=gives,
            tag=tag,
            argument=Argument(kind, *map(int, span)) if kind else None,
            code=code,
            texts=tuple(texts),
            out=out,
            apply=_compiled(code, out or "v"),
        )


_CATALOGUE = Path(__file__).with_name("operations.txt")
OPERATIONS = {found.id: found for found in _read(_CATALOGUE.read_text(encoding="utf-8"))}
"""All operations by their ids."""
