"""Differences and their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from d2f.evaluation.report.results import Row
from d2f.evaluation.statistics import mean_and_error

# Student's t: 95% of the distribution lie within, by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Difference(NamedTuple):
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float
    num_pairs: int
    """How many pairs it rests on."""


def paired_difference(one: Row, other: Row) -> Difference | None:
    """Score of `one` minus score of `other` on the problems both answered, in points.

    Rows may have answered different numbers of problems: the first ones count, if the files of
    problems show them to be the same. Without these files both need the same number. Where no
    answers differ, the interval is that of the rule of three: 3 / n to both sides.

    Returns:
        None where the problems of a row are not known or not the same.

    Example:
        `paired_difference(pipelined, vanilla).low` above -1: at most a point is lost.
    """
    count = min(len(one.digits), len(other.digits))
    if count < 2 or not _same_problems(one, other, count):
        return None
    gaps = [int(a) - int(b) for a, b in zip(one.digits[:count], other.digits[:count], strict=True)]
    mean, error = mean_and_error(gaps)
    reach = 1.96 * error if any(gaps) else 3 / count
    return Difference(100 * mean, 100 * (mean - reach), 100 * (mean + reach), count)


def small_sample(values: Sequence[float]) -> Difference:
    """Mean of a few values with the 95% interval of Student's t; unbounded for a single value.

    Example:
        >>> [round(x, 1) for x in small_sample([1, 2, 3])]
        [2.0, -0.5, 4.5, 3]
    """
    mean, error = mean_and_error(values)
    count = len(values)
    if count < 2:
        return Difference(mean, -math.inf, math.inf, count)
    reach = _T[min(count - 1, len(_T)) - 1] * error
    return Difference(mean, mean - reach, mean + reach, count)


def _same_problems(one: Row, other: Row, count: int) -> bool:
    if one.problem_ids is not None and other.problem_ids is not None:
        return one.problem_ids[:count] == other.problem_ids[:count]
    return len(one.digits) == len(other.digits)
