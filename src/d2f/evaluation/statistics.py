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
