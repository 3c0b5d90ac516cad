"""Catalogue of all operations, by the type that they take."""

from __future__ import annotations

from d2f.problems.functions.numbers import NUMBERS
from d2f.problems.functions.operation import TYPES, Operation
from d2f.problems.functions.strings import STRINGS

OPERATIONS: dict[str, Operation] = {operation.id: operation for operation in (*NUMBERS, *STRINGS)}
"""All operations by their ids."""

ENDING: dict[str, tuple[Operation, ...]] = {
    kind: tuple(operation for operation in OPERATIONS.values() if operation.takes == kind)
    for kind in TYPES
}
"""Operations by the type that they take; each may be the last of a function."""

PASSING: dict[str, tuple[Operation, ...]] = {
    kind: tuple(operation for operation in operations if operation.gives != "bool")
    for kind, operations in ENDING.items()
}
"""The same, without operations whose result no other operation takes."""
