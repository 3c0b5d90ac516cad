"""Inputs: draw values to call a function with, many of them near its constants."""

from __future__ import annotations

from random import Random
from typing import Any

from d2f.problems.functions.operation import Argument
from d2f.problems.functions.pipeline import LETTERS, Pipeline

EMPTY: dict[str, Any] = {"ints": [], "strs": [], "int": 0, "str": ""}
"""The edge case of each type."""

_WORDS = (
    "apple lion tree river stone cloud noon level radar Anna kayak Otto Mia Tom Rome Oslo Berlin "
    "balloon coffee summer little letter mirror book moon cat dog sun ice tea area eel ocean music "
    "noon level radar kayak Paris Nina Leo Emma NASA USA OK data code list salt corn mint colt "
    "rain train plain sale nose tone cone line lime slice east lost tail clam real cream roast"
).split()
_NUMBERS = (*"0123456789", "10", "42", "2026", "7", "15", "303")


class InputSource:
    """Draws inputs of one function; the same stream gives the same inputs.

    Example:
        >>> from d2f.problems.functions.pipeline import OPERATIONS, Step
        >>> pipeline = Pipeline([Step(OPERATIONS["ints.sum"])], "f", ["xs"])
        >>> source = InputSource(Random(0), pipeline)
        >>> isinstance(source.draw(short=True)[0], list)
        True
    """

    def __init__(self, rng: Random, pipeline: Pipeline) -> None:
        self._rng = rng
        self._takes = pipeline.takes
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

    def draw(self, *, short: bool) -> list[Any]:
        """Draw the arguments of a call; `short`: of a call that is shown in the prompt."""
        first = self._value(self._takes, short)
        return [first, *(self._argument(argument, first, short) for argument in self._arguments)]

    def edge(self) -> list[Any]:
        """Draw the arguments of a call with the empty list or string, or with 0."""
        first = EMPTY[self._takes]
        return [first, *(self._argument(argument, first, True) for argument in self._arguments)]

    def _value(self, kind: str, short: bool) -> Any:
        if kind == "ints":
            return self._ints(short)
        if kind == "str":
            return self._text(short)
        if kind == "int":
            return self._number(short)
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
            near[int(draw() * len(near))]
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
            return self._near[int(draw() * len(self._near))]
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
            words.append(self._word() if draw() < 0.7 else _NUMBERS[int(draw() * len(_NUMBERS))])
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
                return LETTERS[int(draw() * len(LETTERS))]
            # First and last letters are drawn often: some operations read only those.
            if place < 0.5:
                return text[0] if place < 0.4 else text[-1]
            return text[int(draw() * len(text))]
        if argument.kind == "ints":
            values = self._ints(short)
            if isinstance(first, list) and first and isinstance(first[0], int):
                values = [first[int(draw() * len(first))] if draw() < 0.4 else x for x in values]
            return values
        return self._word()
