"""Make variants of worked problems: the same text with other numbers and their results."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from d2f.problems.number_variants.numbers import Number, Value, exact, write_number
from d2f.problems.number_variants.redraw import (
    Redraw,
    article_fits,
    order_kept,
    plan_redraw,
    units_kept,
)
from d2f.problems.number_variants.worked_problem import WorkedProblem, read_problem

MOST_VARIANTS = 24
_TRIES = 500
_KEEPS = 0.2
"""Probability that a number which may change keeps its value in a draw."""
_COMPARES = re.compile(
    r"\b(?:cheap\w*|better|best|which|least|most|minimum|maximum|exceed\w*|over|limit\w*|enough|if"
    r"|up to|more than|fewer than|less than|first|rounded?|whichever|afford|until|unless|only)\b",
    re.IGNORECASE,
)
"""Words of questions in which the order of amounts decides what the answer computes."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A problem with its answer, annotations included."""

    question: str
    answer: str


def make_variants(
    question: str, answer: str, *, seed: int = 0, most: int = MOST_VARIANTS
) -> list[Variant]:
    r"""Return variants of a problem with other numbers.

    A number changes only if it occurs in the annotations and each of its uses in the answer is
    certain. Positive results stay positive, whole ones whole, and none gets more decimals.

    Args:
        question: The problem's question.
        answer: The answer with annotations `<<a*b=c>>` and the line `#### c`.
        seed: The draws depend on the seed and the question alone.
        most: Largest number of variants; fewer are returned if no more are found.

    Returns:
        Variants that differ from each other and from the problem; none if nothing may change.

    Example:
        >>> answer = "He eats 3*14=<<3*14=42>>42 pies.\n#### 42"
        >>> made = make_variants("Bo has 14 plates of 3 pies. How many pies?", answer, most=1)
        >>> made[0].question
        'Bo has 14 plates of 2 pies. How many pies?'
        >>> made[0].answer
        'He eats 2*14=<<2*14=28>>28 pies.\n#### 28'
    """
    problem = read_problem(question, answer)
    if problem is None:
        return []
    redraw = plan_redraw(problem)
    if not redraw.pools:
        return []
    digest = hashlib.sha256(f"{seed}\n{question}".encode()).digest()
    rng = random.Random(int.from_bytes(digest[:8], "big"))
    tried = {tuple(number.value for number in problem.numbers)}
    found: list[Variant] = []
    for _ in range(_TRIES):
        if len(found) == most:
            break
        values = _draw(problem, redraw, rng)
        drawn = tuple(values[number.value] for number in problem.numbers)
        if drawn not in tried:
            tried.add(drawn)
            variant = _variant(problem, redraw, values)
            found += [] if variant is None else [variant]
    return found


def strip_annotations(answer: str) -> str:
    """Return the answer without annotations.

    Example:
        >>> strip_annotations("3*4=<<3*4=12>>12")
        '3*4=12'
    """
    return re.sub(r"<<[^<>]*>>", "", answer)


def _draw(problem: WorkedProblem, redraw: Redraw, rng: random.Random) -> dict[Value, Value]:
    """Draw new values for the question's numbers."""
    values = {number.value: number.value for number in problem.numbers}
    bound = {total for total, _, _ in redraw.sums}
    for value, pool in redraw.pools.items():
        # Both are always drawn, so that no number's draw depends on another's.
        stays, other = rng.random() < _KEEPS, rng.choice(pool)
        if value not in bound and not stays:
            values[value] = other
    for total, sign, parts in redraw.sums:
        made = [values[part] for part in parts]
        values[total] = exact(sum(made) if sign == "+" else made[0] * made[1])
    return values


def _variant(
    problem: WorkedProblem, redraw: Redraw, values: Mapping[Value, Value]
) -> Variant | None:
    """Return the problem with these values; None if they do not fit it or each other."""
    if any(values[total] not in redraw.pools[total] for total, _, _ in redraw.sums):
        return None
    if not order_kept(list(values), list(values.values())) or not units_kept(problem, values):
        return None
    results = problem.results(values)
    if results is None or not _results_fit(problem, values, results):
        return None
    question = _rewritten(
        problem.question, ((number, values[number.value]) for number in problem.numbers)
    )
    answer = _rewritten(
        problem.answer,
        ((number, origins[0].value(values, results)) for number, origins in problem.places),
    )
    return None if question is None or answer is None else Variant(question=question, answer=answer)


def _results_fit(
    problem: WorkedProblem, values: Mapping[Value, Value], results: Sequence[Value]
) -> bool:
    stated = [step.stated.value for step in problem.steps]
    for was, now in zip(stated, results, strict=True):
        if (now > 0) != (was > 0) or (now == 1) != (was == 1) or (now == 0) != (was == 0):
            return False
        if (now.denominator == 1) != (was.denominator == 1) or (now < 1) != (was < 1):
            return False
    if _COMPARES.search(problem.question):
        return order_kept([*values, *stated], [*values.values(), *results])
    return True


def _rewritten(text: str, numbers: Iterable[tuple[Number, Value]]) -> str | None:
    """Return the text with other values; None if one cannot be written in its notation."""
    parts, at = [], 0
    for number, value in numbers:
        before = text[at : number.start]
        written = number.text
        if value != number.value:
            new = write_number(value, number.text, money=before.rstrip().endswith("$"))
            if new is None or not article_fits(before, new):
                return None
            written = new
        parts += [before, written]
        at = number.end
    return "".join([*parts, text[at:]])
