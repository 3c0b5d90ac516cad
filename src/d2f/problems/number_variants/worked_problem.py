"""Parse a worked problem into its numbers, its steps, and the origins of each number."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from d2f.problems.number_variants.constants import named_values
from d2f.problems.number_variants.numbers import (
    Formula,
    Number,
    Value,
    exact,
    find_numbers,
    read_formula,
)

Values = Mapping[Value, Value]
"""Old value of a number of the question -> its new value."""
_STEP = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
_MARK = re.compile(r"\n#### *\$?(-?[\d,.]+)\s*$")
_LETTERED = re.compile(r"\d[A-Za-z]\b|\b[A-Za-z]\d")
"""Algebra such as 2x, whose coefficients no formula explains."""
_HUNDREDTHS = re.compile(r" ?(?:%|percent|per cent|-?cents?\b|¢)")
_TRIVIAL = re.compile(r"<<([\d.]+)=\1>>")
_RESULT = re.compile(r"= ?\$?(?=[\d.])")
_PIECE = re.compile(
    r"(?P<number>(?:\d[\d,]*)?\.?\d+)|(?P<sign>[-+*\u00d7\u00f7\u2013\u2212]|\bx\b|/(?![A-Za-z]))"
    r"|(?P<unit>/?[A-Za-z'\u2019]+(?:/[A-Za-z'\u2019]+)*|[$%])|\s+|(?P<other>.)"
)
_SIGNS = str.maketrans("x\u00d7\u00f7\u2013\u2212", "**/--")
"""Signs that people use (cross, division sign, dash, minus sign) -> operators."""
_FARTHEST = 150
"""Number of characters before a result in which its sum is looked for."""


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


Place = tuple[Number, tuple[Origin, ...]]
"""A number of an answer with its possible origins."""


@dataclass(frozen=True, kw_only=True)
class WorkedProblem:
    """A problem of whose answer every number has a known origin."""

    question: str
    answer: str
    numbers: tuple[Number, ...]
    steps: tuple[Step, ...]
    places: tuple[Place, ...]
    """All numbers of the answer, those in annotations included."""

    def results(self, values: Values) -> list[Value] | None:
        """Return the values of all steps; None if one divides by zero."""
        results: list[Value] = []
        for step in self.steps:
            operands = [found[0].value(values, results) for found in step.origins]
            result = step.formula.work_out(operands)
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
    return _Reader(question, answer, marks).read(end)


class _Reader:
    """Finds the origins of a problem's numbers, step by step."""

    def __init__(self, question: str, answer: str, marks: Sequence[re.Match[str]]) -> None:
        self.question, self.answer, self.marks = question, answer, marks
        self.numbers = find_numbers(question)
        self.known = {number.value for number in self.numbers}
        self.named = named_values(f"{question} {_STEP.sub(' ', answer)}")
        self.hundredths = sorted(
            {n.value for n in self.numbers if _HUNDREDTHS.match(question, n.end)}
        )
        self.steps: list[Step] = []
        self.result_at = {mark.end(): number for number, mark in enumerate(marks)}

    def read(self, end: re.Match[str]) -> WorkedProblem | None:
        if not all(map(self._add_step, self.marks)):
            return None
        final = find_numbers(self.answer, end.start())[-1]
        if "-" in end[1] or final.value != self.steps[-1].stated.value:
            return None
        places: list[Place] = []
        start = 0
        for number, (mark, step) in enumerate(zip(self.marks, self.steps, strict=True)):
            places += self._between(start, mark.start(), step)
            places += zip(find_numbers(self.answer, *mark.span(1)), step.origins, strict=True)
            [stated] = find_numbers(self.answer, *mark.span(2))
            places.append((stated, (Origin("result", number),)))
            start = mark.end()
        places += self._between(start, end.start(), None)
        places.append((final, (Origin("result", len(self.steps) - 1),)))
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
        formula, stated = read_formula(mark[1]), find_numbers(mark[2])
        if formula is None or len(stated) != 1 or stated[0].text != mark[2]:
            return False
        if formula.work_out([n.value for n in formula.operands]) != stated[0].value:
            return False
        origins = tuple(self._origins(n.value) for n in formula.operands)
        self.steps.append(Step(formula=formula, origins=origins, stated=stated[0]))
        return all(origins)  # else people computed an operand without writing down from what

    def _origins(self, value: Value) -> tuple[Origin, ...]:
        """Return the possible origins of a value after the steps so far; empty if none."""
        found = [
            Origin("result", number)
            for number, step in enumerate(self.steps)
            if step.stated.value == value
        ]
        if value in self.known:
            found.append(Origin("question", value))
        found += [
            Origin(kind, percent)
            for percent in self.hundredths
            for kind, make in _OF_PERCENT.items()
            if make(percent) == value
        ]
        if value in self.named:
            found.append(Origin("constant", value))
        return tuple(found)

    def _between(self, start: int, end: int, step: Step | None) -> Iterator[Place]:
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
            result = self.result_at.get(number.start)
            if result is not None and self.steps[result].stated.value == number.value:
                yield number, (Origin("result", result),)
            else:
                yield number, mirrored.get(number.start) or self._origins(number.value)


def annotate(answer: str) -> str:
    """Return the answer with `<<a*b=c>>` also before results that follow a sum in the text.

    A sum is annotated if it has no brackets and equals the result. Trivial annotations such as
    `<<5=5>>` are removed.

    Example:
        >>> annotate("He has 3 bags * 4 pies = 12 pies, 12-2=<<12-2=10>>10.")
        'He has 3 bags * 4 pies = <<3*4=12>>12 pies, 12-2=<<12-2=10>>10.'
    """
    answer = _TRIVIAL.sub("", answer)
    parts, at = [], 0
    for found in _RESULT.finditer(answer):
        start = max(answer.rfind(stop, 0, found.start()) for stop in ("\n", "=", ">>"))
        start = max(start + 1, found.start() - _FARTHEST)
        inside = answer.rfind("<<", 0, found.start()) > answer.rfind(">>", 0, found.start())
        result = find_numbers(answer, found.end(), (answer + "\n").find("\n", found.end()))
        if inside or not result or result[0].start != found.end():
            continue
        text = _sum_at_end(answer[start : found.start()])
        formula = read_formula(text) if text else None
        if formula is None or len(formula.operands) < 2:
            continue
        if formula.work_out([number.value for number in formula.operands]) == result[0].value:
            parts += [answer[at : found.end()], f"<<{text}={result[0].text.replace(',', '')}>>"]
            at = found.end()
    return "".join([*parts, answer[at:]])


def _sum_at_end(text: str) -> str:
    """Return the sum at the end of a text, without units; an empty text if there is none."""
    pieces = [(m.lastgroup, m[0]) for m in _PIECE.finditer(text) if m.lastgroup]
    taken: list[str] = []
    wants_number = True
    for kind, piece in reversed(pieces):
        if kind == "unit":
            continue
        if kind != ("number" if wants_number else "sign"):
            break
        taken.append(piece.replace(",", "").translate(_SIGNS))
        wants_number = not wants_number
    return "" if wants_number else "".join(reversed(taken))
