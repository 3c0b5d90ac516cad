"""Cases: the calls of a problem, shown and hidden, and whether they tell it from its like."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

from d2f.problems.functions.inputs import InputSource
from d2f.problems.functions.operation import Argument
from d2f.problems.functions.pipeline import Pipeline, Step

__all__ = ["Case", "CaseSource", "run"]

Case = tuple[list[Any], list[Any]]
"""The arguments of a call, and the value before the first step, between steps and at the end."""

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
    """Do one step; ValueError where that leaves the small values."""
    # A factorial or a range of a large number would take long, only to be turned down.
    if isinstance(value, int) and not -_LARGEST_TAKEN < value < _LARGEST_TAKEN:
        raise ValueError
    value = step.operation.apply(value, argument)
    if not _is_small(value):
        raise ValueError
    return value


def run(pipeline: Pipeline, arguments: list[Any]) -> Case | None:
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


def _vary(cases: list[Case]) -> bool:
    """Whether each step's result varies, and the last one's is not nearly always the same."""
    for results in zip(*(map(repr, values[1:]) for _, values in cases), strict=True):
        if len(set(results)) == 1:
            return False
    commonest = Counter(results).most_common(1)[0][1]
    return commonest <= _MOST_SAME * len(cases)


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


class CaseSource:
    """Draws the calls of one function; none repeats.

    Example:
        >>> from d2f.problems.functions.catalogue import OPERATIONS
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
        """Calls short enough for a prompt, with different results where such come up.

        None where too few inputs are defined.
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
        """Calls that tell the function from its rivals, `count` or a few more.

        The empty list or string, or 0, is among them where the function is defined there. None
        where some step or constant makes no difference, where the result hardly changes, or where
        too few inputs are defined.
        """
        edge = self._new(self._inputs.edge())
        cases = [] if edge is None else [edge]
        # A step without effect shows after a few calls, so that is looked for first.
        for enough in (_FEW, count):
            while len(cases) < enough:
                case = self._any()
                if case is None:
                    return None
                cases.append(case)
            for rival in self._rivals:
                if any(rival.differs(case) for case in cases):
                    continue
                case = self._against(rival) if len(cases) < count + _EXTRA else None
                if case is None:
                    return None
                cases.append(case)
        return cases if _vary(cases[edge is not None :]) else None

    def _against(self, rival: _Rival) -> Case | None:
        for _ in range(_TRIES):
            case = self._draw(short=False)
            if case is not None and rival.differs(case):
                return case
        return None

    def _any(self) -> Case | None:
        for _ in range(_TRIES):
            case = self._draw(short=False)
            if case is not None:
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
