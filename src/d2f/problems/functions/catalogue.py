"""All operations, by what they take."""

from __future__ import annotations

from d2f.problems.functions.numbers import NUMBERS
from d2f.problems.functions.operation import TYPES, Operation
from d2f.problems.functions.strings import STRINGS

__all__ = ["ENDING", "OPERATIONS", "PASSING"]

OPERATIONS: dict[str, Operation] = {operation.id: operation for operation in (*NUMBERS, *STRINGS)}
"""Every operation by its id."""

ENDING: dict[str, tuple[Operation, ...]] = {
    kind: tuple(operation for operation in OPERATIONS.values() if operation.takes == kind)
    for kind in TYPES
}
"""The operations on a type; any may be the last."""

PASSING: dict[str, tuple[Operation, ...]] = {
    kind: tuple(operation for operation in operations if operation.gives != "bool")
    for kind, operations in ENDING.items()
}
"""Those whose result another operation can take."""
