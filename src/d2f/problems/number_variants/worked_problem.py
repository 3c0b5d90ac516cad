"""Parse a worked problem into its numbers, its steps, and the origins of each number."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from d2f.problems.number_variants.annotate import annotate
from d2f.problems.number_variants.constants import named_values
from d2f.problems.number_variants.formula import Formula, read_formula
from d2f.problems.number_variants.numbers import Number, Value, exact, find_numbers

Values = Mapping[Value, Value]
"""Old value of a number of the question -> its new value."""
_STEP = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
_MARK = re.compile(r"\n#### *\$?(-?[\d,.]+)\s*$")
_LETTERED = re.compile(r"\d[A-Za-z]\b|\b[A-Za-z]\d")
"""Algebra such as 2x, whose coefficients no formula explains."""


@dataclass(frozen=True)
class Origin:
    """The source of a number: a number of the question, a step's result, or a word."""

    kind: str
    """Kind of source: "question", "result", "constant", or a key of `_OF_PERCENT`."""
    key: Value

    def value(self, values: Values, results: Sequence[Value]) -> Value:
        """Return the number's value for these values of the question's numbers."""
        if self.kind == "result":
            return results[int(self.key)]
        if self.kind == "constant":
            return self.key
        if self.kind == "question":
            return values[self.key]
        return _OF_PERCENT[self.kind](values[self.key])


_OF_PERCENT: Mapping[str, Callable[[Value], Value]] = {
    "share": lambda p: exact(Fraction(p, 100)),
    "rest of 1": lambda p: exact(1 - Fraction(p, 100)),
    "more than 1": lambda p: exact(1 + Fraction(p, 100)),
    "rest of 100": lambda p: 100 - p,
    "more than 100": lambda p: 100 + p,
}
"""Numbers that people derive from a percentage, or from cents, without writing it down."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """An annotation: its formula, the possible origins of each operand, and its value."""

    formula: Formula
    origins: tuple[tuple[Origin, ...], ...]
    stated: Number

    def work_out(self, values: Values, results: Sequence[Value]) -> Value | None:
        """Return the step's value for other numbers, given the results of earlier steps."""
        return self.formula.work_out([found[0].value(values, results) for found in self.origins])


@dataclass(frozen=True, kw_only=True)
class WorkedProblem:
    """A problem of whose answer every number has a known origin.

    `places` lists all numbers of the answer, those in annotations included, each with its possible
    origins.
    """

    question: str
    answer: str
    numbers: tuple[Number, ...]
    steps: tuple[Step, ...]
    places: tuple[tuple[Number, tuple[Origin, ...]], ...]

    def results(self, values: Values) -> list[Value] | None:
        """Return the values of all steps; None if one divides by zero."""
        results: list[Value] = []
        for step in self.steps:
            result = step.work_out(values, results)
            if result is None:
                return None
            results.append(result)
        return results

    def depends_on(self, origin: Origin) -> frozenset[Value]:
        """Return the values of the question on which an origin depends."""
        if origin.kind == "constant":
            return frozenset()
        if origin.kind != "result":
            return frozenset([origin.key])
        found = self.steps[int(origin.key)].origins
        return frozenset().union(*(self.depends_on(o) for origins in found for o in origins))


def read_problem(question: str, answer: str) -> WorkedProblem | None:
    r"""Parse a problem; return None if a number of the answer has no known origin.

    Args:
        question: The question's text.
        answer: The answer's text with annotations `<<a*b=c>>` and the last line `#### c`.

    Example:
        >>> answer = "He eats 3*4=<<3*4=12>>12.\n#### 12"
        >>> problem = read_problem("Bo eats 3 pies on each of 4 plates. How many?", answer)
        >>> [origins[0].kind for _, origins in problem.places]
        ['question', 'question', 'question', 'question', 'result', 'result', 'result']
    """
    answer = annotate(answer)
    end = _MARK.search(answer)
    marks = list(_STEP.finditer(answer))
    plain = _STEP.sub(" ", answer)
    if end is None or not marks or "<<" in plain or ">>" in plain or _LETTERED.search(plain):
        return None
    if any(answer[m.start() - 1].isdigit() and answer[m.end()].isdigit() for m in marks):
        return None
    return _Reader(question, answer).read(marks)


class _Reader:
    """Finds the origins of a problem's numbers, step by step."""

    def __init__(self, question: str, answer: str) -> None:
        self.question, self.answer = question, answer
        self.numbers = find_numbers(question)
        self.known = {number.value for number in self.numbers}
        self.named = named_values(f"{question} {_STEP.sub(' ', answer)}")
        self.steps: list[Step] = []
        self.hundredths = {
            n.value
            for n in self.numbers
            if re.match(r" ?(?:%|percent|per cent|-?cents?\b|¢)", question[n.end :])
        }

    def read(self, marks: Sequence[re.Match[str]]) -> WorkedProblem | None:
        places: list[tuple[Number, tuple[Origin, ...]]] = []
        for mark in marks:
            if not self._add_step(mark):
                return None
        last = len(marks) - 1
        result_at = {mark.end(): number for number, mark in enumerate(marks)}
        start = 0
        for number, mark in enumerate(marks):
            places += self._between(start, mark.start(), result_at, self.steps[number])
            places += self._inside(number, mark)
            start = mark.end()
        end = _MARK.search(self.answer)
        assert end is not None
        places += self._between(start, end.start(), result_at, None)
        final = find_numbers(self.answer, end.start())[-1]
        if "-" in end[1] or final.value != self.steps[last].stated.value:
            return None
        places.append((final, (Origin("result", last),)))
        if not all(origins for _, origins in places):
            return None
        return WorkedProblem(
            question=self.question,
            answer=self.answer,
            numbers=tuple(self.numbers),
            steps=tuple(self.steps),
            places=tuple(places),
        )

    def _add_step(self, mark: re.Match[str]) -> bool:
        formula = read_formula(mark[1])
        stated = find_numbers(mark[2])
        if formula is None or len(stated) != 1 or stated[0].text != mark[2]:
            return False
        if formula.work_out([n.value for n in formula.operands]) != stated[0].value:
            return False
        origins = tuple(self._origins(n.value, len(self.steps)) for n in formula.operands)
        if not all(origins):
            return False  # people computed this operand without writing down from what
        self.steps.append(Step(formula=formula, origins=origins, stated=stated[0]))
        return True

    def _origins(self, value: Value, num_steps: int) -> tuple[Origin, ...]:
        """Return the possible origins of a value after `num_steps` steps; empty if none."""
        found = [
            Origin("result", number)
            for number, step in enumerate(self.steps[:num_steps])
            if step.stated.value == value
        ]
        if value in self.known:
            found.append(Origin("question", value))
        for percent in sorted(self.hundredths):
            for kind, make in _OF_PERCENT.items():
                if make(percent) == value:
                    found.append(Origin(kind, percent))
        if value in self.named:
            found.append(Origin("constant", value))
        return tuple(found)

    def _inside(
        self, number: int, mark: re.Match[str]
    ) -> Iterator[tuple[Number, tuple[Origin, ...]]]:
        step = self.steps[number]
        operands = find_numbers(self.answer, mark.start(1), mark.end(1))
        yield from zip(operands, step.origins, strict=True)
        [stated] = find_numbers(self.answer, mark.start(2), mark.end(2))
        yield stated, (Origin("result", number),)

    def _between(
        self, start: int, end: int, result_at: Mapping[int, int], step: Step | None
    ) -> Iterator[tuple[Number, tuple[Origin, ...]]]:
        """Yield the numbers outside annotations with their possible origins.

        Numbers that write out a formula right before its step have the origins of its operands.
        """
        numbers = find_numbers(self.answer, start, end)
        mirrored: dict[int, tuple[Origin, ...]] = {}
        if step is not None:
            tail = numbers[-len(step.origins) :]
            if [n.value for n in tail] == [n.value for n in step.formula.operands]:
                mirrored = {n.start: o for n, o in zip(tail, step.origins, strict=True)}
        for number in numbers:
            result = result_at.get(number.start)
            if result is not None and self.steps[result].stated.value == number.value:
                yield number, (Origin("result", result),)
            elif number.start in mirrored:
                yield number, mirrored[number.start]
            else:
                yield number, self._origins(number.value, len(self.steps))
