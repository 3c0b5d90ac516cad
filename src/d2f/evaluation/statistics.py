"""Numbers that stand for many numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of the values do not exceed; nan of none.

    Example:
        >>> percentile([4.0, 1.0, 3.0, 2.0], 50), percentile([1.0, 2.0], 99)
        (2.0, 2.0)
    """
    if not values:
        return math.nan
    rank = math.ceil(percent / 100 * len(values))
    return sorted(values)[max(rank, 1) - 1]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the latter needs two values.

    Example:
        >>> mean_and_error([1, 3])
        (2.0, 1.0)
    """
    return sum(values) / len(values), standard_deviation(values) / math.sqrt(len(values))


def standard_deviation(values: Sequence[float]) -> float:
    """Of the population that the values were drawn from; nan of a single value.

    Example:
        >>> standard_deviation([1, 3, 5])
        2.0
    """
    if len(values) < 2:
        return math.nan
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
