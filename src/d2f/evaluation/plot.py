"""The race as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2f.errors import ConfigError


def plot_race(rows: Sequence[Mapping[str, Any]], path: str | Path, *, title: str) -> None:
    """Draw tokens per second and tokens per forward of each row as bars, into a PNG.

    Args:
        rows: `Row.summary()` of each runner.
        path: Where the PNG goes.
        title: What ran where.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError:
        raise ConfigError(
            "the plot needs matplotlib: pip install matplotlib, or leave it out with --no-plot"
        ) from None
    names = [row["name"] for row in rows]
    panels = (
        ("tokens_per_second", "tokens per second", "{:.0f}"),
        ("tokens_per_forward", "tokens per forward", "{:.1f}"),
        ("score", "share of problems solved", "{:.0%}"),
    )
    figure = Figure(figsize=(11, 0.55 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    colors = ["#d1495b" if name == "pipelined" else "#8d99ae" for name in names]
    for axis, (key, label, form) in zip(axes, panels, strict=True):
        values = [row[key] for row in rows]
        bars = axis.barh(names, values, color=colors)
        labels = [form.format(value) for value in values]
        if key == "score":
            labels = [
                f"{text} of {row['num_problems']}" for text, row in zip(labels, rows, strict=True)
            ]
        axis.bar_label(bars, labels, padding=3)
        axis.set_xlabel(label)
        # Room for the labels; but no model solves more than all problems.
        axis.set_xlim(0, 1 if key == "score" else max(values) * 1.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].xaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
