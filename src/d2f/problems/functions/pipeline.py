"""Pipelines: the operations of a function, with their arguments and all names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from d2f.problems.functions.operation import OPERATIONS, TYPES, Argument, Operation

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

PARAMETERS = {
    "ints": "xs values data items".split(),
    "int": "n num value z".split(),
    "strs": "names labels tokens entries".split(),
    "str": "s line phrase message".split(),
}
"""Names for the first parameter, by its type."""

_ARGUMENTS = {
    "int": "k m limit amount".split(),
    "letter": "ch char letter symbol".split(),
    "ints": "ys others more second".split(),
    "str": "t other extra suffix".split(),
}
PLAIN_NAMES = "solve process compute transform f g helper convert run evaluate".split()
_PREFIXES = "get do make find".split()
SEPARATORS = (",", "-", " ", "_", "/", "+")
LETTERS = "aeiostrnlcm"

# Types of the first parameter; each stands here as often as its share.
_STARTS = ("ints",) * 9 + ("str",) * 6 + ("strs",) * 3 + ("int",) * 3


@dataclass(slots=True)
class Step:
    """One operation with its argument: a constant, a parameter or neither."""

    operation: Operation
    constant: Any = None
    parameter: str = ""
    index: int = 0
    """Position of the parameter among those of the function."""


@dataclass(slots=True)
class Pipeline:
    """A chain of operations, with the names of the function and its parameters."""

    steps: list[Step]
    name: str
    parameters: list[str]
    """Names of the parameters; the steps start from the first."""

    @property
    def takes(self) -> str:
        """Type of the first parameter."""
        return self.steps[0].operation.takes

    @property
    def gives(self) -> str:
        """Type of the result."""
        return self.steps[-1].operation.gives

    @property
    def structure(self) -> str:
        """The text that `FunctionProblem.structure` describes."""
        parts = [self.takes]
        for step in self.steps:
            argument = step.operation.argument
            kind = "" if argument is None else f"({argument.kind if step.parameter else '#'})"
            parts.append(step.operation.tag + kind)
        return ">".join(parts)

    def source(self) -> str:
        """Return the function's source."""
        variable = self.parameters[0]
        lines = [f"def {self.name}({', '.join(self.parameters)}):"]
        for step in self.steps:
            code = step.operation.code.format(v=variable, k=write_argument(step))
            lines += [f"    {line}" for line in code.split("\n")]
            variable = step.operation.out or variable
        lines.append(f"    return {variable}")
        return "\n".join(lines)


def write_argument(step: Step) -> str:
    """Return the argument as it is written in code and wordings."""
    return step.parameter or json.dumps(step.constant)


def choose(rng: Random, values: Any) -> Any:
    """Draw one of several values."""
    return values[int(rng.random() * len(values))]


def sample_operations(rng: Random, num_steps: int) -> list[Operation] | None:
    """Draw operations, each taking the type that the last one gives; None if one repeats.

    Example:
        >>> operations = sample_operations(Random(2), 2)
        >>> operations is None or operations[0].gives == operations[1].takes
        True
    """
    kind = choose(rng, _STARTS)
    chosen: list[Operation] = []
    for left in range(num_steps, 0, -1):
        operation = choose(rng, (PASSING if left > 1 else ENDING)[kind])
        if operation in chosen:
            return None
        chosen.append(operation)
        kind = operation.gives
    return chosen


def _constant(rng: Random, argument: Argument) -> Any:
    if argument.kind == "int":
        return argument.low + int(rng.random() * (argument.high - argument.low + 1))
    return choose(rng, LETTERS if argument.kind == "letter" else SEPARATORS)


def _name(rng: Random, operations: list[Operation]) -> str:
    """Draw a name that tells the operations, or one that tells nothing."""
    if rng.random() < 0.4:
        return choose(rng, PLAIN_NAMES)
    if len(operations) == 1 or rng.random() < 0.4:
        # A prefix keeps the name from hiding a builtin: a function named `sum` would call itself.
        return f"{choose(rng, _PREFIXES)}_{choose(rng, operations).tag}"
    return f"{operations[0].tag}_{operations[-1].tag}"


def sample_pipeline(
    rng: Random, operations: list[Operation], parameter_rate: float
) -> Pipeline | None:
    """Draw arguments and names; None for over three parameters or two of one name.

    Example:
        >>> square = ENDING["int"][5]
        >>> sample_pipeline(Random(3), [square], 0.5).source().splitlines()[1:]
        ['    n = n * n', '    return n']
    """
    parameters = [choose(rng, PARAMETERS[operations[0].takes])]
    steps = []
    for operation in operations:
        step = Step(operation)
        argument = operation.argument
        if argument is not None:
            if argument.can_be_parameter and (
                not argument.can_be_constant or rng.random() < parameter_rate
            ):
                step.parameter = choose(rng, _ARGUMENTS[argument.kind])
                step.index = len(parameters)
                parameters.append(step.parameter)
            else:
                step.constant = _constant(rng, argument)
        steps.append(step)
    if len(parameters) > 3 or len(set(parameters)) < len(parameters):
        return None
    return Pipeline(steps, _name(rng, operations), parameters)
