"""Accuracy under parallelism (AUP): one number for a curve of accuracy over tokens per forward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from d2f.errors import ConfigError
from d2f.evaluation.report import table as show
from d2f.evaluation.report.curves import Curve, curve_table, parallelism, score_curves
from d2f.evaluation.report.rows import Comparison
from d2f.evaluation.report.table import Column, Table

ALPHA = 3.0
"""Rate at which the weight of an accuracy falls below the best accuracy of all methods."""
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
    for rho, accuracy in points:
        if not (math.isfinite(rho) and rho > 0):
            raise ConfigError(f"{rho} tokens per forward: they must be above 0")
        if not 0 <= accuracy <= best:
            raise ConfigError(f"accuracy {accuracy} is not between 0 and the best, {best}")
    ordered = sorted(points)
    first = ordered[0][1]
    kept = [(rho, y) for rho, y in ordered if y >= first - MAX_LOSS]
    weighted = [(rho, y * min(math.exp(-ALPHA * (1 - y / best)), 1.0)) for rho, y in kept]
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(weighted))
    return float(kept[0][0] * kept[0][1] + area)


def areas(curves: Sequence[Curve]) -> Mapping[str, float]:
    """AUP of each curve; the best accuracy is that of all of them."""
    known = {
        curve.name: [
            (rho, row.score)
            for row in curve.rows
            if (rho := parallelism(row)) and row.score is not None
        ]
        for curve in curves
    }
    best = max((score for points in known.values() for _, score in points), default=0.0)
    if best <= 0:
        return {}
    return {
        name: accuracy_under_parallelism(points, best) for name, points in known.items() if points
    }


def curve_table_with_areas(comparison: Comparison) -> Table | None:
    """All points of the figures, and each curve's AUP in the line of its first point."""
    table, found = curve_table(comparison), areas(score_curves(comparison))
    if table is None:
        return None
    lines, seen = [], set()
    for line in table.lines:
        curve = line["curve"]
        lines.append({**line, "aup": None if curve in seen else found.get(curve)})
        seen.add(curve)
    column = Column(key="aup", header="AUP of the curve", form=show.significant)
    notes = [
        "Score against seconds per problem is what counts. AUP (accuracy under parallelism, of "
        "d3LLM) is secondary: it ignores what a forward costs, depends on the best method in this "
        "table, and is not comparable across papers."
    ]
    return replace(table, columns=[*table.columns, column], lines=lines, notes=notes)
