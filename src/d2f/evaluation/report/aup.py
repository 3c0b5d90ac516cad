"""Accuracy under parallelism: one number for a curve of accuracy over tokens per forward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from d2f.errors import ConfigError

ALPHA = 3.0
"""How fast the weight of an accuracy falls that is below the best of all methods."""
MAX_LOSS = 5.0
"""Points whose accuracy lies further below the curve's first are dropped."""


def accuracy_under_parallelism(points: Sequence[tuple[float, float]], best: float) -> float:
    """The area that d3LLM's code computes; higher is better.

    The points are sorted by tokens per forward rho_1 <= rho_2 <= …, with accuracies y_i in percent;
    those with y_i < y_1 - 5 are dropped. Then, with W(y) = min(exp(-3 (1 - y / y_best)), 1),

        AUP = rho_1 y_1
              + sum over i >= 2 of (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2

    Read it beside other figures only: two points make a curve already; `best` depends on who
    else is in the table, so a further method moves everybody's number; a forward counts the same
    whatever it costs (branches, attention over all positions, no cache); the first term has no
    weight; and others print an unweighted area under the same name, so numbers of different papers
    cannot be compared. Score against seconds per problem has none of these weaknesses.

    Args:
        points: Tokens per forward and accuracy in percent, in any order.
        best: y_best, the best accuracy of any method on this test set, in percent.

    Raises:
        ConfigError: There are no points, a number is not positive and finite (an accuracy may be
            0), or an accuracy exceeds `best`.

    Example:
        >>> accuracy_under_parallelism([(1, 80), (2, 80)], best=80)
        160.0
    """
    if not points:
        raise ConfigError("accuracy under parallelism of no points; it needs at least one")
    if not (math.isfinite(best) and best > 0):
        raise ConfigError(f"the best accuracy is {best}; it must be above 0 percent")
    for parallelism, accuracy in points:
        if not (math.isfinite(parallelism) and parallelism > 0):
            raise ConfigError(f"{parallelism} tokens per forward: they must be above 0")
        if not 0 <= accuracy <= best:
            raise ConfigError(f"accuracy {accuracy} is not between 0 and the best, {best}")
    ordered = sorted(points)
    first = ordered[0][1]
    kept = [(rho, y) for rho, y in ordered if y >= first - MAX_LOSS]
    weighted = [(rho, y * min(math.exp(-ALPHA * (1 - y / best)), 1.0)) for rho, y in kept]
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(weighted))
    return float(kept[0][0] * kept[0][1] + area)
