"""Plan a redraw: find the numbers of a question that may change, and their possible values."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from d2f.problems.number_variants.numbers import Number, Value, exact
from d2f.problems.number_variants.worked_problem import WorkedProblem

_FIXED_BEFORE = re.compile(
    r"(?:[\d.]/|[/:#A-Za-z]|\d-|(?:grade|level|number|no\.|chapter|room|page|route|highway|class"
    r"|version|phase|part|at|until|till|by|from|since)\s)$",
    re.IGNORECASE,
)
_FIXED_AFTER = re.compile(
    r"/|:\d|-?(?:st|nd|rd|th|s)\b|[A-Za-z]\b|[ -]\d+/\d|-\d|-(?:for|to|in|by)-"
    r"|\s?(?:[ap]\.?m\b|o'clock)",
    re.IGNORECASE,
)
_UNITS = {
    "day": 7, "hour": 24, "minute": 60, "second": 60, "month": 12, "week": 52, "inch": 12,
}  # fmt: skip
"""Unit -> its count in the next larger unit. A changed count stays on the same side of that."""
_UNIT = re.compile(rf"[ -]?({'|'.join(_UNITS)})(?:e?s)?\b")
_PERCENT = re.compile(r" ?(?:%|percent|per cent)")
_ARTICLE = re.compile(r"\b(an?) \$?$", re.IGNORECASE)
_YEAR = re.compile(r"(?:1[5-9]|20)\d\d")
_SMALL = 4
"""Largest value that an answer may also get by counting names; see `_counted_elsewhere`."""


Sum = tuple[Value, str, tuple[Value, ...]]
"""A value, the sign `+` or `*`, and the values whose sum or product it is."""


@dataclass(frozen=True, kw_only=True)
class Redraw:
    """The plan for a problem's variants."""

    pools: Mapping[Value, tuple[Value, ...]]
    """Values of the question that may change, each with its possible new values."""
    sums: tuple[Sum, ...]
    """Sums and products in the question, which must remain so."""


def plan_redraw(problem: WorkedProblem) -> Redraw:
    """Find the values that may change because each has a single role in the problem.

    A value must stay if it may have a second role: if a number of the answer has two possible
    origins that would differ, if a word names the same value, or in dates and fractions.
    """
    known = {number.value for number in problem.numbers}
    frozen = {n.value for n in problem.numbers if _is_fixed(problem.question, n)}
    frozen |= _counted_elsewhere(problem) | _fixed_percents(problem)
    used = {
        value
        for step in problem.steps
        for origins in step.origins
        for origin in origins
        for value in problem.depends_on(origin)
    }
    frozen |= known - used
    sums = _sums(known)
    before = -1
    while len(frozen) != before:
        before = len(frozen)
        frozen |= _ambiguous(problem, frozen)
        for total, _, parts in sums:
            if total in frozen:
                frozen |= set(parts)
            elif set(parts) <= frozen:
                frozen.add(total)
        pools = {v: _pool(problem, v) for v in sorted(known - frozen)}
        frozen |= {value for value, pool in pools.items() if len(pool) < 2}
    return Redraw(pools=pools, sums=tuple(found for found in sums if found[0] not in frozen))


def _is_fixed(question: str, number: Number) -> bool:
    before = question[: number.start]
    return bool(
        number.value in (0, 1)
        or _FIXED_BEFORE.search(before)
        or _FIXED_AFTER.match(question, number.end)
        or (_YEAR.fullmatch(number.text) and not before.endswith("$"))
    )


def _counted_elsewhere(problem: WorkedProblem) -> set[Value]:
    """Return small values that the answer uses more often than the question names them."""
    named = [number.value for number in problem.numbers]
    used = [
        n.value
        for step in problem.steps
        for n, origins in zip(step.formula.operands, step.origins, strict=True)
        if any(origin.kind == "question" for origin in origins)
    ]
    return {v for v in named if v <= _SMALL and used.count(v) > named.count(v)}


def _fixed_percents(problem: WorkedProblem) -> set[Value]:
    """Return percentages that add up to 100 or of which a step leaves out the 100.

    Such a step computes 40 / 10 for 10% of 40.
    """
    percents = [n.value for n in problem.numbers if _PERCENT.match(problem.question, n.end)]
    found: set[Value] = set()
    for size in range(2, len(percents) + 1):
        for some in itertools.combinations(percents, size):
            if sum(some) == 100:
                found.update(some)
    for step in problem.steps:
        values = {number.value for number in step.formula.operands}
        if step.formula.multiplies and not values & {100, Fraction(1, 100)}:
            found |= values & set(percents)
    return found


def _sums(known: set[Value]) -> list[Sum]:
    """Return values that are a sum or product of others in the question, one way for each."""
    found: dict[Value, Sum] = {}
    values = sorted(known - {0, 1})
    for size in (2, 3):
        for parts in itertools.combinations(values, size):
            product = parts[0] * parts[1] if size == 2 else None
            for total, sign in ((sum(parts), "+"), (product, "*")):
                if total in known and total not in parts and total is not None:
                    found.setdefault(exact(total), (exact(total), sign, parts))
    return [found[total] for total in sorted(found)]


def _ambiguous(problem: WorkedProblem, frozen: set[Value]) -> set[Value]:
    """Return the values behind a number whose possible origins differ after a trial change."""
    known = {number.value for number in problem.numbers}
    noise = random.Random(0)
    for _ in range(2):
        values = {
            v: v if v in frozen else v + Fraction(noise.randrange(1, 10**6), 997) for v in known
        }
        results = problem.results(values)
        if results is None:
            return set(known)
        for _, origins in problem.places:
            if len({origin.value(values, results) for origin in origins}) > 1:
                return set().union(*(problem.depends_on(origin) for origin in origins)) - frozen
    return set()


def _pool(problem: WorkedProblem, value: Value) -> tuple[Value, ...]:
    """Return values near another one with as many digits and as many trailing zeros."""
    at = [number for number in problem.numbers if number.value == value]
    step = _step(value, max(len(number.text.partition(".")[2]) for number in at))
    digits = len(str(int(value)))
    percent = any(_PERCENT.match(problem.question, n.end) for n in at)
    lowest, highest = Fraction(value, 2), value * 2
    first = -(-lowest // step)
    pool = (exact((first + i) * step) for i in range(int((highest - lowest) / step) + 1))
    return tuple(
        found
        for found in pool
        if lowest <= found <= highest
        and found not in (0, 1)
        and len(str(int(found))) == digits
        and (found < 1) == (value < 1)
        and ((found * 10).denominator == 1) == ((value * 10).denominator == 1)
        and (found.denominator == 1) == (value.denominator == 1)
        and not (percent and (found >= 100) != (value >= 100))
        and all(article_fits(problem.question[: n.start], str(int(found))) for n in at)
    )


def _step(value: Value, decimals: int) -> Fraction:
    """Return the distance between neighbouring values that are as round as this one."""
    if value.denominator != 1:
        steps = [Fraction(1, 2), Fraction(1, 4), Fraction(1, 10), Fraction(1, 20), Fraction(1, 100)]
        smallest = Fraction(1, 10**decimals)
        return next(
            (s for s in steps if Fraction(value / s).denominator == 1 and s >= smallest), smallest
        )
    whole = int(value)
    zeros = len(str(whole)) - len(str(whole).rstrip("0"))
    if zeros and whole >= 100:
        return Fraction(10 ** min(zeros, len(str(whole)) - 2))
    return Fraction(5 if whole % 5 == 0 and whole >= 15 else 1)


def article_fits(before: str, number: str) -> bool:
    """Return whether a number in digits suits the article, `a` or `an`, if any, before it."""
    found = _ARTICLE.search(before)
    whole = number.replace(",", "").partition(".")[0]
    article = "an" if whole.startswith("8") or whole in ("11", "18") else "a"
    return found is None or article == found[1].lower()


def units_kept(problem: WorkedProblem, values: Mapping[Value, Value]) -> bool:
    """Return whether counts of days, hours and so on stay below, at or above the next unit."""
    for number in problem.numbers:
        unit = _UNIT.match(problem.question, number.end)
        if unit is not None:
            limit = _UNITS[unit[1]]
            if _side(number.value, limit) != _side(values[number.value], limit):
                return False
    return True


def order_kept(before: Sequence[Value], after: Sequence[Value]) -> bool:
    """Return whether values have the same order as before, and equal ones are still equal."""
    order = sorted(range(len(before)), key=lambda i: before[i])
    return all(
        _side(before[i], before[j]) == _side(after[i], after[j])
        for i, j in itertools.pairwise(order)
    )


def _side(one: Value, other: Value) -> int:
    return (one > other) - (one < other)
