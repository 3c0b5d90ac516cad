"""One setting measured in several experiments: how far its speeds lie apart."""

from __future__ import annotations

import json
from typing import Any

from d2f.evaluation.report import table as show
from d2f.evaluation.report.rows import Comparison, Row
from d2f.evaluation.report.table import Column, Table, median

APART = 1.1
"""Times that medians of one setting may lie apart before a warning stands below the table."""
_SAME = (
    "model", "strategy", "policy", "options", "max_new_tokens", "early_stop", "temperature",
    "num_fewshot",
)  # fmt: skip


def repeat_table(comparison: Comparison) -> Table | None:
    """Speeds of what was measured more than once, each time in another experiment.

    They show what a ratio of rows of different tables is worth: nothing else changed but the time
    of measuring and what the machine did besides.

    Example:
        `repeat_table(comparison).lines[0]["apart"]`: 1.05 is a good machine.
    """
    groups: dict[str, list[Row]] = {}
    for row in comparison.rows:
        if row.tokens_per_second is not None:
            groups.setdefault(_setting(row), []).append(row)
    lines: list[dict[str, Any]] = []
    for rows in groups.values():
        if len({row.summary["experiment"] for row in rows}) < 2:
            continue
        speeds = [median(row.tokens_per_second) or 0.0 for row in rows]
        places = [f"{row.summary['experiment']}, {row.name}" for row in rows]
        lines.append(
            {
                "method": rows[0].method,
                "speeds": "; ".join(
                    f"{show.significant(speed)} ({place})"
                    for speed, place in zip(speeds, places, strict=True)
                ),
                "apart": max(speeds) / min(speeds),
            }
        )
    if not lines:
        return None
    columns = [
        Column(key="method", header="method", is_number=False),
        Column(key="speeds", header="tokens/s (experiment, row)", is_number=False),
        Column(key="apart", header="highest / lowest", form=show.times),
    ]
    notes = ["The same weights and settings; rounds of one experiment take turns, experiments not."]
    if max(line["apart"] for line in lines) > APART:
        notes.append(
            "**Warning: speeds of one setting lie apart between experiments; compare rows of one "
            "table only.**"
        )
    title = f"The same setting in several experiments: {comparison.title}"
    return Table(name="repeats", title=title, columns=columns, lines=lines, notes=notes)


def _setting(row: Row) -> str:
    same = {key: row.summary.get(key) for key in _SAME}
    return json.dumps([same, row.speed_batch_size], sort_keys=True, default=str)
