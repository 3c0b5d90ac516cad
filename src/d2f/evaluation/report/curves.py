"""Score against cost: the points that figures draw, and the areas under them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2f.evaluation.report import table as show
from d2f.evaluation.report.ablations import threshold_curve
from d2f.evaluation.report.aup import accuracy_under_parallelism
from d2f.evaluation.report.results import Comparison, Row
from d2f.evaluation.report.table import Column, Table, median

D2F = "D2F, thresholds"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What is joined by a line: one method at several settings, or a single point."""

    name: str
    method: str
    rows: Sequence[Row]
    """Ordered along the line."""


def score_curves(comparison: Comparison) -> list[Curve]:
    """D2F over thresholds, vanilla over steps, and each other method as a point.

    Example:
        `[curve.name for curve in score_curves(comparison)]`
    """
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
    """By default a token a step."""
    return row.setting("num_steps") or row.room[0]


def parallelism(row: Row) -> float | None:
    """Tokens per forward on the problems of the score."""
    return row.number("tokens_per_forward", "score", "speed")


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


def curve_table(comparison: Comparison) -> Table | None:
    """All points of the figures, and each curve's AUP."""
    curves = score_curves(comparison)
    found = areas(curves)
    if not found:
        return None
    lines = []
    for curve in curves:
        for count, row in enumerate(curve.rows):
            lines.append(
                {
                    "curve": curve.name,
                    "row": row.name,
                    "score": row.score,
                    "seconds_per_problem": median(row.seconds_per_problem),
                    "tokens_per_second": median(row.tokens_per_second),
                    "tokens_per_forward": parallelism(row),
                    "aup": found.get(curve.name) if count == 0 else None,
                }
            )
    columns = [
        Column(key="curve", header="curve", is_number=False),
        Column(key="row", header="row", is_number=False),
        Column(key="score", header="score, %", form=show.points),
        Column(key="seconds_per_problem", header="s/problem", form=show.significant),
        Column(key="tokens_per_second", header="tokens/s", form=show.significant),
        Column(key="tokens_per_forward", header="tokens/forward", form=show.significant),
        Column(key="aup", header="AUP of the curve", form=show.significant),
    ]
    notes = [
        "Score against seconds per problem is what counts. AUP (accuracy under parallelism, of "
        "d3LLM) is secondary: it ignores what a forward costs, depends on the best method in this "
        "table, and is not comparable across papers."
    ]
    title = f"Score against cost: {comparison.title}"
    return Table(name="curves", title=title, columns=columns, lines=lines, notes=notes)
