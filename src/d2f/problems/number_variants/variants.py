"""Make variants of worked problems: the same text with other numbers and their results.

A collection of problems is split here, too: kept aside, trained on, test set with new numbers.
"""

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
NUM_KNOWN = 1000
_NUM_KEPT_ASIDE = 500
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


@dataclass(frozen=True, kw_only=True)
class Collection:
    r"""Worked problems in three parts, which depend on the seed and the questions alone.

    Args:
        problems: Questions with annotated answers.
        seed: Decides which problems are kept aside and which numbers are drawn.

    Example:
        >>> problems = [Variant(question=f"{'q' * n}-9?", answer="#### 9") for n in range(40)]
        >>> collection = Collection(problems=problems)
        >>> len(collection.kept_aside()), len(collection.to_train_on())
        (4, 36)
    """

    problems: Sequence[Variant]
    seed: int = 0

    def kept_aside(self) -> list[Variant]:
        """Return the problems to choose settings on; no training row is a variant of them.

        Their number is 500, or a tenth of all problems if that is less.
        """
        return self._parts()[0]

    def to_train_on(self) -> list[Variant]:
        """Return the problems to train on, in the order in which new numbers are drawn.

        A problem that differs from one kept aside only in its numbers is left out.
        """
        aside, rest = self._parts()
        words = {_words(problem) for problem in aside}
        return [problem for problem in rest if _words(problem) not in words]

    def known_with_new_numbers(self, count: int = NUM_KNOWN) -> list[Variant]:
        """Return the test set: a variant of each of the first `count` problems that have one.

        No question of an original problem is among them. Training rows may equal one of them by
        chance, as variants of another problem with the same words; whoever writes training rows
        must leave those out.
        """
        found: dict[str, Variant] = {}
        written = {problem.question for problem in self.problems}
        for problem in self.to_train_on():
            if len(found) == count:
                break
            for new in make_variants(problem.question, problem.answer, seed=self.seed, most=1):
                if new.question not in written:
                    found.setdefault(new.question, new)
        return list(found.values())

    def _parts(self) -> tuple[list[Variant], list[Variant]]:
        """Return the problems in two parts, ordered by a hash of the question."""

        def key(problem: Variant) -> bytes:
            return hashlib.sha256(f"part {self.seed}\n{problem.question}".encode()).digest()

        ordered = sorted(self.problems, key=key)
        num_aside = min(_NUM_KEPT_ASIDE, len(ordered) // 10)
        return ordered[:num_aside], ordered[num_aside:]


def _words(problem: Variant) -> str:
    """Return the question with each number replaced by 0."""
    return re.sub(r"\d[\d,.]*", "0", problem.question)
