"""Test cases: the shown and the hidden calls of a function, which similar functions fail.

Inputs are drawn near the function's constants, so that a call tells it from similar ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from d2f.problems.functions.operation import Argument
from d2f.problems.functions.pipeline import LETTERS, Pipeline, Step, choose

Case = tuple[list[Any], list[Any]]
"""Arguments of a call, and the values before the first step and after each step."""

_EMPTY: dict[str, Any] = {"ints": [], "strs": [], "int": 0, "str": ""}
"""The edge case of each type."""

_WORDS = (
    "apple lion tree river stone cloud noon level radar Anna kayak Otto Mia Tom Rome Oslo Berlin "
    "balloon coffee summer little letter mirror book moon cat dog sun ice tea area eel ocean music "
    "noon level radar kayak Paris Nina Leo Emma NASA USA OK data code list salt corn mint colt "
    "rain train plain sale nose tone cone line lime slice east lost tail clam real cream roast"
).split()
_NUMBERS = (*"0123456789", "10", "42", "2026", "7", "15", "303")

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


def _apply(step: Step, value: Any, argument: Any) -> Any:
    """Return the value after one step; raise ValueError if it is not small."""
    # A factorial or a range of a large number would take long, and be rejected afterwards.
    if isinstance(value, int) and not -_LARGEST_TAKEN < value < _LARGEST_TAKEN:
        raise ValueError
    value = step.operation.apply(value, argument)
    if not _is_small(value):
        raise ValueError
    return value


def _values(pipeline: Pipeline, at: int, value: Any, arguments: list[Any]) -> list[Any] | None:
    """Return a value and those after each step from `at` on; None if one is undefined."""
    values = [value]
    try:
        for step in pipeline.steps[at:]:
            argument = arguments[step.index] if step.parameter else step.constant
            value = _apply(step, value, argument)
            values.append(value)
    except _UNDEFINED:
        return None
    return values


def run(pipeline: Pipeline, arguments: list[Any]) -> Case | None:
    """Call the function; return None if it is undefined there or a value is not small."""
    values = _values(pipeline, 0, arguments[0], arguments)
    return None if values is None else (arguments, values)


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
        rest = _values(self.pipeline, self.at + 1, value, arguments)
        return rest is None or rest[-1] != values[-1]


def _rivals(pipeline: Pipeline) -> list[_Rival]:
    rivals = []
    for i, step in enumerate(pipeline.steps):
        operation, argument = step.operation, step.operation.argument
        if operation.takes == operation.gives:
            rivals.append(_Rival(pipeline, i, 0))
        if argument is not None and argument.kind == "int" and not step.parameter:
            rivals += (_Rival(pipeline, i, 1), _Rival(pipeline, i, -1))
    return rivals


class _Inputs:
    """Draws inputs of one function; the same stream gives the same inputs."""

    def __init__(self, rng: Random, pipeline: Pipeline) -> None:
        self._rng = rng
        self._empty = _EMPTY[pipeline.takes]
        self._first: Callable[[bool], Any] = {
            "ints": self._ints, "str": self._text, "int": self._number, "strs": self._texts
        }[pipeline.takes]  # fmt: skip
        self._arguments: list[Argument] = []
        self._near: list[int] = []
        self._letter = ""
        for step in pipeline.steps:
            argument = step.operation.argument
            if argument is None:
                continue
            if step.parameter:
                self._arguments.append(argument)
            elif argument.kind == "int":
                self._near += (step.constant, step.constant + 1, step.constant - 1)
            elif argument.kind == "letter":
                self._letter = step.constant

    def draw(self, *, short: bool, edge: bool = False) -> list[Any]:
        """Draw the arguments of a call.

        Args:
            short: The call is shown in the prompt.
            edge: The first argument is the empty list or string, or 0.
        """
        first = self._empty if edge else self._first(short)
        return [first, *(self._argument(argument, first, short) for argument in self._arguments)]

    def _texts(self, short: bool) -> list[str]:
        size = 2 + int(self._rng.random() * 2) if short else int(self._rng.random() * 6)
        words = [self._word() for _ in range(size)]
        if size > 2 and self._rng.random() < 0.3:
            words[-1] = words[0]
        return words

    def _ints(self, short: bool) -> list[int]:
        draw = self._rng.random
        size = 3 + int(draw() * 2) if short else int(1 + draw() * 7)
        near = self._near
        high = 13 if short else 24
        values = [
            choose(self._rng, near)
            if near and draw() < 0.2
            else int(draw() * high) - (3 if short else 9) * (draw() < 0.4)
            for _ in range(size)
        ]
        shape = draw()
        if shape < 0.12:
            values.sort()
        elif shape < 0.3 and size > 1:
            values[-1] = values[0]
        return values

    def _number(self, short: bool) -> int:
        draw = self._rng.random
        share = draw()
        if self._near and share < 0.2:
            return choose(self._rng, self._near)
        if share < 0.6:
            return int(draw() * 13)
        if share < 0.85 or short:
            return int(draw() * 100)
        return int(draw() * 1000) if share < 0.94 else -int(draw() * 50)

    def _word(self) -> str:
        draw = self._rng.random
        word = _WORDS[int(draw() * len(_WORDS))]
        share = draw()
        if share < 0.12:
            return word.capitalize()
        if share < 0.2:
            return word.upper()
        return word + _NUMBERS[int(draw() * 10)] if share < 0.3 else word

    def _text(self, short: bool) -> str:
        draw = self._rng.random
        words = [self._word()]
        while len(words) < 3 and draw() < (0.45 if short else 0.6):
            words.append(self._word() if draw() < 0.7 else choose(self._rng, _NUMBERS))
        text = " ".join(words)
        if self._letter and draw() < 0.35:
            place = int(draw() * (len(text) + 1))
            text = text[:place] + self._letter + text[place:]
        return text

    def _argument(self, argument: Argument, first: Any, short: bool) -> Any:
        draw = self._rng.random
        if argument.kind == "int":
            return argument.low + int(draw() * (argument.high - argument.low + 1))
        if argument.kind == "letter":
            text = first if isinstance(first, str) else repr(first)
            text = "".join(c for c in text if c.isalpha())
            place = draw()
            if not text or place < 0.2:
                return choose(self._rng, LETTERS)
            # First and last letters are drawn often: some operations read only those.
            if place < 0.5:
                return text[0] if place < 0.4 else text[-1]
            return choose(self._rng, text)
        if argument.kind == "ints":
            values = self._ints(short)
            if isinstance(first, list) and first and isinstance(first[0], int):
                values = [choose(self._rng, first) if draw() < 0.4 else x for x in values]
            return values
        return self._word()


class CaseSource:
    """Draws the calls of one function, without repetition.

    Example:
        >>> from d2f.problems.functions.operation import OPERATIONS
        >>> pipeline = Pipeline([Step(OPERATIONS["ints.sum"])], "f", ["xs"])
        >>> [len(CaseSource(Random(0), pipeline).hidden(count)) for count in (6, 8)]
        [6, 8]
    """

    def __init__(self, rng: Random, pipeline: Pipeline) -> None:
        self._inputs = _Inputs(rng, pipeline)
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
        edge = self._draw(short=True, edge=True)
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

    def _draw(self, *, short: bool, edge: bool = False) -> Case | None:
        arguments = self._inputs.draw(short=short, edge=edge)
        if arguments in self._seen:
            return None
        case = run(self._pipeline, arguments)
        if case is not None:
            self._seen.append(arguments)
        return case
