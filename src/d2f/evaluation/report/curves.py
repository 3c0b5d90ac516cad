"""Score against cost: the points that figures draw, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from d2f.evaluation.report import table as show
from d2f.evaluation.report.rows import Comparison, Row
from d2f.evaluation.report.table import Column, Table, median

D2F = "D2F, thresholds"
THRESHOLDS = ("activate_threshold", "confidence_threshold", "add_threshold")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One method at several settings, whose points a line joins, or a single point."""

    name: str
    method: str
    rows: Sequence[Row]
    """Rows, ordered along the line."""


def score_curves(comparison: Comparison) -> list[Curve]:
    """List the curves: D2F over thresholds, vanilla over steps, other methods as points."""
    steps = [row for row in comparison.of("steps") if row.method.startswith("vanilla")]
    # The full number of steps is a row of `methods`, unless the experiment has it too. A row that
    # goes on after EOS is no point of the line of rows that do not.
    vanilla = [row for row in comparison.of("methods") if row.method.startswith("vanilla")]
    known = {_num_steps(row) for row in steps}
    rooms = {row.room for row in steps}
    steps += [row for row in vanilla if row.room in rooms and _num_steps(row) not in known][:1]
    steps.sort(key=lambda row: median(row.seconds_per_problem) or 0.0)
    method = steps[0].method if steps else "vanilla"
    found = [
        Curve(name=D2F, method="pipelined", rows=threshold_curve(comparison)),
        Curve(name=f"{method}, fewer steps", method=method, rows=steps),
    ]
    drawn = [row for curve in found for row in curve.rows]
    others = [row for row in comparison.of("methods") if row not in drawn]
    labels = [row.label for row in others]
    found += [
        Curve(
            name=row.label if labels.count(row.label) == 1 else f"{row.label}, {row.name}",
            method=row.method,
            rows=[row],
        )
        for row in others
    ]
    return [curve for curve in found if curve.rows]


def _num_steps(row: Row) -> Any:
    """Give the number of steps, by default one for each token."""
    return row.setting("num_steps") or row.room[0]


def parallelism(row: Row) -> float | None:
    """Give the tokens per forward on the problems of the score."""
    return row.number("tokens_per_forward", "score", "speed")


def curve_table(comparison: Comparison) -> Table | None:
    """Make the table of all points of the figures; None where no row has a score above 0."""
    curves = score_curves(comparison)
    if not any(row.score and parallelism(row) for curve in curves for row in curve.rows):
        return None
    lines = [
        {
            "curve": curve.name,
            "row": row.name,
            "score": row.score,
            "seconds_per_problem": median(row.seconds_per_problem),
            "tokens_per_second": median(row.tokens_per_second),
            "tokens_per_forward": parallelism(row),
        }
        for curve in curves
        for row in curve.rows
    ]
    columns = [
        Column("curve", "curve", is_number=False),
        Column("row", "row", is_number=False),
        Column("score", "score, %", show.points),
        Column("seconds_per_problem", "s/problem", show.significant),
        Column("tokens_per_second", "tokens/s", show.significant),
        Column("tokens_per_forward", "tokens/forward", show.significant),
    ]
    title = f"Score against cost: {comparison.title}"
    notes = ["Score against seconds per problem is what counts."]
    return Table(name="curves", title=title, columns=columns, lines=lines, notes=notes)


def by_thresholds(comparison: Comparison) -> list[Row]:
    """Give the rows of the experiment `thresholds`, strictest first."""
    return sorted(comparison.of("thresholds"), key=thresholds_of, reverse=True)


def thresholds_of(row: Row) -> tuple[float, ...]:
    """Give a row's thresholds (activate, confidence, add); 0 where unknown."""
    return tuple(float(row.setting(key) or 0) for key in THRESHOLDS)


def threshold_curve(comparison: Comparison) -> list[Row]:
    """Choose the add threshold with the most levels of the others; its rows, strictest first.

    Such rows vary the activate and confidence thresholds together at one add threshold.
    """
    groups: dict[float, dict[tuple[float, ...], Row]] = {}
    for row in by_thresholds(comparison):
        *level, add = thresholds_of(row)
        # Settings that were measured twice are one level.
        groups.setdefault(add, {}).setdefault(tuple(level), row)
    if not groups:
        return []
    return [*max(groups.items(), key=lambda item: (len(item[1]), -item[0]))[1].values()]
