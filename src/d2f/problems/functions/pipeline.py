"""Pipelines: which operations a function consists of, with their arguments and all names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from d2f.problems.functions.catalogue import ENDING, PASSING
from d2f.problems.functions.operation import Argument, Operation

__all__ = ["PARAMETERS", "PLAIN_NAMES", "SEPARATORS", "Pipeline", "Step", "sample_pipeline"]

PARAMETERS = {
    "ints": "xs values data items".split(),
    "int": "n num value z".split(),
    "strs": "names labels tokens entries".split(),
    "str": "s line phrase message".split(),
}
"""Names of the value that a function starts from."""

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

# How often each type is what a function starts from.
_STARTS = ("ints",) * 9 + ("str",) * 6 + ("strs",) * 3 + ("int",) * 3


@dataclass(slots=True)
class Step:
    """One operation with its argument: a constant, a parameter or neither."""

    operation: Operation
    constant: Any = None
    parameter: str = ""
    index: int = 0
    """Which of the function's arguments the parameter is."""


@dataclass(slots=True)
class Pipeline:
    """Operations that feed each other, and the names of the function and its parameters."""

    steps: list[Step]
    name: str
    parameters: list[str]
    """The first is the value that the steps start from."""

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
        """See `FunctionProblem.structure`."""
        parts = [self.takes]
        for step in self.steps:
            argument = step.operation.argument
            kind = "" if argument is None else f"({argument.kind if step.parameter else '#'})"
            parts.append(step.operation.tag + kind)
        return ">".join(parts)

    def source(self) -> str:
        """The function in plain Python."""
        variable = self.parameters[0]
        lines = [f"def {self.name}({', '.join(self.parameters)}):"]
        for step in self.steps:
            out = step.operation.out or variable
            code = step.operation.code.format(v=variable, o=out, k=write_argument(step))
            lines += [f"    {line}" for line in code.split("\n")]
            variable = out
        lines.append(f"    return {variable}")
        return "\n".join(lines)


def write_argument(step: Step) -> str:
    """The argument as code and wordings show it."""
    return step.parameter or json.dumps(step.constant)


def _choose(rng: Random, values: Any) -> Any:
    return values[int(rng.random() * len(values))]


def sample_operations(rng: Random, num_steps: int) -> list[Operation] | None:
    """Draw operations that fit each other, or None where the draw repeats itself.

    Example:
        >>> operations = sample_operations(Random(2), 2)
        >>> operations is None or operations[0].gives == operations[1].takes
        True
    """
    kind = _choose(rng, _STARTS)
    chosen: list[Operation] = []
    for left in range(num_steps, 0, -1):
        operation = _choose(rng, (PASSING if left > 1 else ENDING)[kind])
        if operation in chosen:
            return None
        chosen.append(operation)
        kind = operation.gives
    return chosen


def _constant(rng: Random, argument: Argument) -> Any:
    if argument.kind == "int":
        return argument.low + int(rng.random() * (argument.high - argument.low + 1))
    return _choose(rng, LETTERS if argument.kind == "letter" else SEPARATORS)


def _name(rng: Random, operations: list[Operation]) -> str:
    """A name that says what is done, or a plain one."""
    if rng.random() < 0.4:
        return _choose(rng, PLAIN_NAMES)
    if len(operations) == 1 or rng.random() < 0.4:
        # Never the bare word: `sum` would call itself.
        return f"{_choose(rng, _PREFIXES)}_{_choose(rng, operations).tag}"
    return f"{operations[0].tag}_{operations[-1].tag}"


def sample_pipeline(
    rng: Random, operations: list[Operation], parameter_rate: float
) -> Pipeline | None:
    """Give operations their arguments and names, or None for more parameters than is readable.

    Example:
        >>> square = ENDING["int"][5]
        >>> sample_pipeline(Random(3), [square], 0.5).source().splitlines()[1:]
        ['    n = n * n', '    return n']
    """
    parameters = [_choose(rng, PARAMETERS[operations[0].takes])]
    steps = []
    for operation in operations:
        step = Step(operation)
        argument = operation.argument
        if argument is not None:
            if argument.can_be_parameter and (
                not argument.can_be_constant or rng.random() < parameter_rate
            ):
                step.parameter = _choose(rng, _ARGUMENTS[argument.kind])
                step.index = len(parameters)
                parameters.append(step.parameter)
            else:
                step.constant = _constant(rng, argument)
        steps.append(step)
    if len(parameters) > 3 or len(set(parameters)) < len(parameters):
        return None
    return Pipeline(steps, _name(rng, operations), parameters)
