"""Draw a race as bars, and make the figures of all plots."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2f.errors import ConfigError

HIGHLIGHT = "#d1495b"
"""Colour of D2F."""
MUTED = "#8d99ae"
"""Colour of what D2F is compared with."""


def new_figure(width: float, height: float, *, without: str) -> Any:
    """Make an empty figure of matplotlib, sizes in inches; option `without` leaves plots out.

    Raises:
        ConfigError: matplotlib is not installed.

    Example:
        >>> float(new_figure(4, 3, without="--no-plot").get_figwidth())
        4.0
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            f"the plot needs matplotlib: pip install matplotlib, or leave it out with {without}"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


def trim(axis: Any) -> None:
    """Take away the two sides of the frame that say nothing."""
    axis.spines[["top", "right"]].set_visible(False)


def check_format(path: str | Path) -> None:
    """Refuse a file of a kind that cannot be drawn; a name without an ending is that of a PNG.

    Raises:
        ConfigError: matplotlib draws no such files.

    Example:
        >>> check_format("race.svg")
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if _format(path) not in known:
        raise ConfigError(
            f"{path} is no picture that can be drawn; its name may end in "
            f"{', '.join('.' + ending for ending in sorted(known))}"
        )


def _format(path: str | Path) -> str:
    return Path(path).suffix.removeprefix(".").lower() or "png"


def plot_race(rows: Sequence[Mapping[str, Any]], path: str | Path, *, title: str) -> None:
    """Draw tokens per second and tokens per forward of each row as bars, into a file.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure = new_figure(11, 0.55 * len(rows) + 1.6, without="--no-plot")
    from matplotlib.ticker import PercentFormatter

    names = [row["name"] for row in rows]
    panels = (
        ("tokens_per_second", "tokens per second", "{:.0f}"),
        ("tokens_per_forward", "tokens per forward", "{:.1f}"),
        ("score", "share of problems solved", "{:.0%} of {}"),
    )
    axes = figure.subplots(1, len(panels), sharey=True)
    colors = [HIGHLIGHT if name == "pipelined" else MUTED for name in names]
    for axis, (key, label, form) in zip(axes, panels, strict=True):
        values = [row[key] for row in rows]
        labels = [form.format(row[key], row["num_problems"]) for row in rows]
        axis.bar_label(axis.barh(names, values, color=colors), labels, padding=3)
        axis.set_xlabel(label)
        # Room for the labels; but no model solves more than all problems.
        axis.set_xlim(0, 1 if key == "score" else max(values) * 1.25)
        trim(axis)
    axes[-1].xaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes[0].invert_yaxis()
    figure.suptitle(title)
    part = Path(path).with_name(f"{Path(path).name}.part")
    figure.savefig(part, dpi=150, format=_format(path))
    os.replace(part, path)
