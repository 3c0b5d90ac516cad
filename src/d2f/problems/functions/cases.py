"""Cases: the calls of a problem, shown and hidden, and whether they tell it from its like."""

from __future__ import annotations

from random import Random
from typing import Any

from d2f.problems.functions.inputs import InputSource
from d2f.problems.functions.operation import Argument
from d2f.problems.functions.pipeline import Pipeline, Step
from d2f.problems.functions.problem import FunctionConfig

__all__ = ["Case", "Cases", "draw_cases"]

Case = tuple[list[Any], list[Any]]
"""The arguments of a call, and the value before the first step, between steps and at the end."""

Cases = tuple[list[Case], list[Case]]
"""Shown and hidden."""

_LARGEST = 10_000
_LARGEST_TAKEN = 1_000
_LONGEST = {"ints": 12, "strs": 12, "str": 40}
_MOST_SHOWN = 56
_TRIES = 14
_EXTRA = 2
_UNDEFINED = (ValueError, IndexError, ZeroDivisionError, OverflowError)


def _is_small(value: Any) -> bool:
    if isinstance(value, int):
        return -_LARGEST < value < _LARGEST
    if isinstance(value, str):
        return len(value) <= _LONGEST["str"]
    if len(value) > _LONGEST["ints"]:
        return False
    if value and isinstance(value[0], int):
        return max(value) < _LARGEST and min(value) > -_LARGEST
    return sum(map(len, value)) <= _LONGEST["str"]


def _argument(step: Step, arguments: list[Any]) -> Any:
    return arguments[step.index] if step.parameter else step.constant


def _apply(step: Step, value: Any, argument: Any) -> Any:
    """Do one step; ValueError where that leaves the small values."""
    # A factorial or a range of a large number would take long, only to be turned down.
    if isinstance(value, int) and not -_LARGEST_TAKEN < value < _LARGEST_TAKEN:
        raise ValueError
    value = step.operation.apply(value, argument)
    if not _is_small(value):
        raise ValueError
    return value


def _run(pipeline: Pipeline, arguments: list[Any]) -> Case | None:
    """Call the function, or return None where it is not defined or leaves the small values."""
    value = arguments[0]
    values = [value]
    try:
        for step in pipeline.steps:
            value = _apply(step, value, _argument(step, arguments))
            values.append(value)
    except _UNDEFINED:
        return None
    return arguments, values


def _finish(pipeline: Pipeline, at: int, value: Any, arguments: list[Any]) -> Any:
    """Go on from step `at` with another value; None where that is not defined."""
    try:
        for step in pipeline.steps[at:]:
            value = _apply(step, value, _argument(step, arguments))
    except _UNDEFINED:
        return None
    return value


class _Rival:
    """The function with one step left out, or with one constant changed by one."""

    def __init__(self, pipeline: Pipeline, at: int, change: int) -> None:
        self._pipeline = pipeline
        self._at = at
        self._change = change

    def differs(self, case: Case) -> bool:
        """Whether this case tells the two apart."""
        arguments, values = case
        value = values[self._at]
        if self._change:
            step = self._pipeline.steps[self._at]
            try:
                value = _apply(step, value, step.constant + self._change)
            except _UNDEFINED:
                return True
        after = values[self._at + 1]
        if type(value) is type(after) and value == after:
            return False
        return _finish(self._pipeline, self._at + 1, value, arguments) != values[-1]


def _rivals(pipeline: Pipeline) -> list[_Rival]:
    rivals = []
    for i, step in enumerate(pipeline.steps):
        operation = step.operation
        if operation.takes == operation.gives:
            rivals.append(_Rival(pipeline, i, 0))
        argument: Argument | None = operation.argument
        if argument is not None and argument.kind == "int" and not step.parameter:
            rivals += (_Rival(pipeline, i, 1), _Rival(pipeline, i, -1))
    return rivals


class _Draw:
    """Draws cases that no earlier one repeats."""

    def __init__(self, rng: Random, pipeline: Pipeline) -> None:
        self._source = InputSource(rng, pipeline)
        self._pipeline = pipeline
        self._seen: list[list[Any]] = []

    def shown(self, earlier: list[Case]) -> Case | None:
        """A case short enough for the prompt, if possible with another result than those before."""
        found = None
        results = [case[1][-1] for case in earlier]
        for _ in range(_TRIES):
            case = self._keep(self._source.draw(short=True))
            if case is not None:
                found = case
                if case[1][-1] not in results and case[1][-1] != case[1][0]:
                    break
        return found

    def hidden(self) -> Case | None:
        """Any case."""
        for _ in range(_TRIES):
            arguments = self._source.draw(short=False)
            case = self._new(arguments)
            if case is not None:
                return case
        return None

    def edge(self) -> Case | None:
        """The case of the empty list or string, or of 0, where it is defined."""
        return self._new(self._source.edge())

    def _keep(self, arguments: list[Any]) -> Case | None:
        if len(repr(arguments)) > _MOST_SHOWN:
            return None
        case = self._new(arguments)
        if case is None or len(repr(case[1][-1])) > _MOST_SHOWN:
            return None
        return case

    def _new(self, arguments: list[Any]) -> Case | None:
        if arguments in self._seen:
            return None
        case = _run(self._pipeline, arguments)
        if case is not None:
            self._seen.append(arguments)
        return case


def draw_cases(rng: Random, pipeline: Pipeline, config: FunctionConfig) -> Cases | None:
    """Draw the calls of a problem.

    None where some step or constant makes no difference, where the result hardly changes, or where
    too few inputs are defined.
    """
    draw = _Draw(rng, pipeline)
    shown: list[Case] = []
    for _ in range(config.num_examples):
        case = draw.shown(shown)
        if case is None:
            return None
        shown.append(case)
    edge = draw.edge()
    hidden: list[Case] = [] if edge is None else [edge]
    while len(hidden) < config.num_tests:
        case = draw.hidden()
        if case is None:
            return None
        hidden.append(case)
    for rival in _rivals(pipeline):
        if any(rival.differs(case) for case in reversed(hidden)):
            continue
        if len(hidden) == config.num_tests + _EXTRA:
            return None
        for _ in range(_TRIES):
            case = draw.hidden()
            if case is not None and rival.differs(case):
                hidden.append(case)
                break
        else:
            return None
    results = [repr(case[1][-1]) for case in hidden]
    if len(set(results)) < (2 if pipeline.gives == "bool" else 3):
        return None
    return shown, hidden
