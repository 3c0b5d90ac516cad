"""Test cases: the shown and the hidden calls of a function, which similar functions fail."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import Any

from d2f.problems.functions.inputs import InputSource
from d2f.problems.functions.operation import Argument
from d2f.problems.functions.pipeline import Pipeline, Step

Case = tuple[list[Any], list[Any]]
"""Arguments of a call, and the values before the first step and after each step."""

_LARGEST = 10_000
_LARGEST_TAKEN = 1_000
_LONGEST = {"ints": 12, "strs": 12, "str": 40}
_MOST_SHOWN = 80
_TRIES = 10
_TRIES_SHOWN = 7
_EXTRA = 2
_FEW = 3
_MOST_SAME = 0.75
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
    """Return the value after one step; raise ValueError if it is not small."""
    # A factorial or a range of a large number would take long, and be rejected afterwards.
    if isinstance(value, int) and not -_LARGEST_TAKEN < value < _LARGEST_TAKEN:
        raise ValueError
    value = step.operation.apply(value, argument)
    if not _is_small(value):
        raise ValueError
    return value


def run(pipeline: Pipeline, arguments: list[Any]) -> Case | None:
    """Call the function; return None if it is undefined there or a value is not small."""
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
    """Return the result of the steps from `at` on for another value; None if undefined."""
    try:
        for step in pipeline.steps[at:]:
            value = _apply(step, value, _argument(step, arguments))
    except _UNDEFINED:
        return None
    return value


def _vary(cases: list[Case]) -> bool:
    """Return whether each step has several results, and the last step no dominant one."""
    for results in zip(*(map(repr, values[1:]) for _, values in cases), strict=True):
        if len(set(results)) == 1:
            return False
    commonest = Counter(results).most_common(1)[0][1]
    return commonest <= _MOST_SAME * len(cases)


@dataclass(frozen=True)
class _Rival:
    """A similar function: step `at` is left out, or its constant changed by `change`."""

    pipeline: Pipeline
    at: int
    change: int

    def differs(self, case: Case) -> bool:
        """Return whether the similar function gives another result in this case."""
        arguments, values = case
        value = values[self.at]
        if self.change:
            step = self.pipeline.steps[self.at]
            try:
                value = _apply(step, value, step.constant + self.change)
            except _UNDEFINED:
                return True
        after = values[self.at + 1]
        if type(value) is type(after) and value == after:
            return False
        return _finish(self.pipeline, self.at + 1, value, arguments) != values[-1]


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


class CaseSource:
    """Draws the calls of one function, without repetition.

    Example:
        >>> from d2f.problems.functions.pipeline import OPERATIONS
        >>> pipeline = Pipeline([Step(OPERATIONS["ints.sum"])], "f", ["xs"])
        >>> [len(CaseSource(Random(0), pipeline).hidden(count)) for count in (6, 8)]
        [6, 8]
    """

    def __init__(self, rng: Random, pipeline: Pipeline) -> None:
        self._inputs = InputSource(rng, pipeline)
        self._pipeline = pipeline
        self._rivals = _rivals(pipeline)
        self._seen: list[list[Any]] = []

    def shown(self, count: int) -> list[Case] | None:
        """Draw calls that are short enough for a prompt, with different results if possible.

        The result is None if the function is defined for too few inputs.
        """
        cases: list[Case] = []
        results: list[Any] = []
        for _ in range(count):
            found = None
            for _ in range(_TRIES_SHOWN):
                case = self._draw(short=True)
                if case is None or len(repr(case[0])) + len(repr(case[1][-1])) > _MOST_SHOWN:
                    continue
                found = case
                if case[1][-1] not in results and case[1][-1] != case[1][0]:
                    break
            if found is None:
                return None
            cases.append(found)
            results.append(found[1][-1])
        return cases

    def hidden(self, count: int) -> list[Case] | None:
        """Draw `count` calls or a few more, on which each similar function fails at least once.

        The empty list or string, or 0, is among them if the function is defined there. The result
        is None if some step or constant has no effect, if the function's result hardly changes, or
        if the function is defined for too few inputs.
        """
        edge = self._new(self._inputs.edge())
        cases = [] if edge is None else [edge]
        # A few calls reveal a step without effect, so the similar functions are tried early.
        for enough in (_FEW, count):
            while len(cases) < enough:
                case = self._try()
                if case is None:
                    return None
                cases.append(case)
            for rival in self._rivals:
                if any(rival.differs(case) for case in cases):
                    continue
                case = self._try(rival) if len(cases) < count + _EXTRA else None
                if case is None:
                    return None
                cases.append(case)
        return cases if _vary(cases[edge is not None :]) else None

    def _try(self, rival: _Rival | None = None) -> Case | None:
        """Draw a case, one in which the rival differs if there is one; None after some tries."""
        for _ in range(_TRIES):
            case = self._draw(short=False)
            if case is not None and (rival is None or rival.differs(case)):
                return case
        return None

    def _draw(self, *, short: bool) -> Case | None:
        return self._new(self._inputs.draw(short=short))

    def _new(self, arguments: list[Any]) -> Case | None:
        if arguments in self._seen:
            return None
        case = run(self._pipeline, arguments)
        if case is not None:
            self._seen.append(arguments)
        return case
