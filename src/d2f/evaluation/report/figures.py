"""Draw the pictures of a report, with a panel for each model family and test set."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2f.evaluation.plot import HIGHLIGHT, MUTED, new_figure, trim
from d2f.evaluation.report.curves import D2F, Curve, parallelism, score_curves
from d2f.evaluation.report.rows import Comparison, Row, Spread
from d2f.evaluation.report.table import median, significant, times

DPI = 110
NUM_COLORS = 128
_STRETCH_FROM = 80.0
_LOG_FROM = 20.0
"""Longest over shortest bar from which on the axis is logarithmic."""
FAST_DLLM = ("fast-dllm-parallel", "fast-dllm-prefix", "fast-dllm-dual")
# Colour (Okabe and Ito's, beside the two of the demo's plot) and marker of a method.
_LOOKS = {
    "autoregressive": ("#0072b2", "s"),
    "vanilla": (MUTED, "o"),
    "vanilla-eos-stop": ("#5c677d", "v"),
    "vanilla-512": ("#33415c", "<"),
    "dllm-cache": ("#009e73", "P"),
    "fast-dllm-parallel": ("#b8860b", "X"),
    "fast-dllm-prefix": ("#e69f00", "^"),
    "fast-dllm-dual": ("#f0c94a", ">"),
    "undistilled": ("#cc79a7", "p"),
    "serial": ("#56b4e9", "h"),
    "pipelined": (HIGHLIGHT, "D"),
    "control": ("#000000", "x"),
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture, which shows each comparison on axes of its own."""

    name: str
    """Name of the file, without its ending."""
    title: str
    draw: Callable[[Any, Comparison], bool]
    """Draws a comparison on axes; False where its rows are not there."""
    height: float = 4.0
    """Inches; a legend below the axes needs more."""


def draw_figures(
    comparisons: Sequence[Comparison], folder: Path, panels: Sequence[Panel] | None = None
) -> list[Panel]:
    """Write all pictures (by default those of `d2f report`) whose rows are there; return these.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    written = []
    for panel in PANELS if panels is None else panels:
        drawn = [c for c in comparisons if panel.draw(_axes(1, 4)[1][0], c)]
        if drawn:
            _write(panel, folder, drawn)
            written.append(panel)
    return written


def _axes(count: int, height: float) -> tuple[Any, list[Any]]:
    columns = min(count, 2)
    rows = -(-count // columns)
    figure = new_figure(6.4 * columns, height * rows + 0.3, without="--no-figures")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def _write(panel: Panel, folder: Path, comparisons: Sequence[Comparison]) -> None:
    figure, axes = _axes(len(comparisons), panel.height)
    for axis, comparison in zip(axes, comparisons, strict=True):
        panel.draw(axis, comparison)
        trim(axis)
        axis.set_title(comparison.title, fontsize=11)
    figure.suptitle(panel.title, fontsize=13)
    from PIL import Image  # matplotlib writes its own PNG files with it

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png")
    path = folder / f"{panel.name}.png"
    part = path.with_name(path.name + ".part")
    # A palette makes the file a third as large; reports are committed.
    Image.open(drawn).convert("RGB").quantize(NUM_COLORS).save(part, format="png", optimize=True)
    part.replace(path)


def look(method: str) -> tuple[str, str]:
    """Give the colour and the marker of a method."""
    return _LOOKS.get(method, ("#000000", "*"))


Beside = Callable[[Any, Comparison, Sequence[Row]], list[float]]
"""Draws more points beside the bars of these rows; returns their values."""


def draw_bars(axis: Any, comparison: Comparison, beside: Beside | None = None) -> bool:
    """Draw tokens/s of vanilla, the best of Fast-dLLM, autoregression and D2F as bars."""
    rows = _bar_rows(comparison)
    if len(rows) < 2:
        return False
    names = [row.label for row in rows]
    speeds = [row.tokens_per_second or Spread(0, 0, 0) for row in rows]
    values = [speed.median for speed in speeds]
    errors = [
        [speed.median - speed.lowest for speed in speeds],
        [speed.highest - speed.median for speed in speeds],
    ]
    colors = [HIGHLIGHT if row.method == "pipelined" else MUTED for row in rows]
    axis.barh(names, values, color=colors, xerr=errors, error_kw={"lw": 1, "capsize": 3})
    base = next((r.tokens_per_second for r in rows if r.method == "autoregressive"), None)
    for place, speed in enumerate(speeds):
        share = f" ({times(speed.median / base.median)})" if base else ""
        axis.annotate(
            f"{significant(speed.median)}{share}",
            (speed.highest, place - (0.2 if beside else 0)),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
        )
    axis.invert_yaxis()
    axis.set_xlabel("tokens per second" + (" (x autoregression)" if base else ""))
    shown = [value for speed in speeds for value in (speed.lowest, speed.highest)]
    if beside:
        shown += beside(axis, comparison, rows)
    _bar_axis(axis, min(shown), max(shown))
    return True


def _bar_axis(axis: Any, shortest: float, longest: float) -> None:
    """Leave room for the numbers; use a logarithm where the shortest bar would not be seen."""
    if longest < _LOG_FROM * shortest:
        axis.set_xlim(0, 1.35 * longest)
        return
    axis.set_xscale("log")
    start = 10 ** math.floor(math.log10(shortest))
    axis.set_xlim(start, longest * (longest / start) ** 0.35)
    plain_ticks(axis.xaxis, per_decade=(1,))


def _bar_rows(comparison: Comparison) -> list[Row]:
    """Choose a row for each bar."""
    timed = [row for row in comparison.of("methods") if row.tokens_per_second]
    found = []
    for methods in (("vanilla",), FAST_DLLM, ("autoregressive",), ("pipelined",)):
        rows = [row for row in timed if row.method in methods]
        if rows:
            found.append(max(rows, key=lambda row: median(row.tokens_per_second) or 0))
    return found


def draw_scores(
    axis: Any,
    comparison: Comparison,
    cost_of: Callable[[Row], float | None],
    cost: str,
    name_of: Callable[[Curve], str] = lambda curve: curve.name,
) -> bool:
    """Draw the scores of all curves against a cost; False where no row has both."""
    drawn = draw_curves(axis, comparison, cost_of, lambda row: row.score, name_of)
    axis.set_xlabel(cost)
    _score_axis(axis, comparison)
    finish(axis, drawn)
    return drawn


def draw_curves(
    axis: Any,
    comparison: Comparison,
    cost_of: Callable[[Row], float | None],
    score_of: Callable[[Row], float | None],
    name_of: Callable[[Curve], str] = lambda curve: curve.name,
) -> bool:
    """Draw every curve's points with the standard errors of their scores; False without any."""
    drawn = False
    for curve in score_curves(comparison):
        rows = [row for row in curve.rows if cost_of(row) and row.score is not None]
        if not rows:
            continue
        drawn = True
        color, marker = look(curve.method)
        axis.errorbar(
            [cost_of(row) for row in rows],
            [score_of(row) for row in rows],
            yerr=[row.standard_error or 0 for row in rows],
            color=color,
            # The line through many settings, and the row of the tables beside it.
            marker="." if curve.name == D2F else marker,
            markersize=8,
            linestyle="none" if len(rows) == 1 else "-",
            linewidth=1.5,
            elinewidth=0.8,
            capsize=2,
            label=name_of(curve),
        )
    return drawn


def finish(axis: Any, drawn: bool) -> None:
    """Give a picture of curves its grid, its scale and its legend, if anything was drawn."""
    if not drawn:
        return
    axis.grid(alpha=0.3)
    axis.set_xscale("log")
    plain_ticks(axis.xaxis)
    # Below the axes: the points fill any corner.
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, fontsize=8)


def plain_ticks(axis: Any, per_decade: Sequence[int] = (1, 2, 5)) -> None:
    """Write plain numbers at some places of each decade of a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=per_decade))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _score_axis(axis: Any, comparison: Comparison) -> None:
    """Scale scores in percent; where they come close to 100, stretch the axis there."""
    scores = [
        row.score for c in score_curves(comparison) for row in c.rows if row.score is not None
    ]
    axis.set_ylabel("score, %")
    if not scores or max(scores) < _STRETCH_FROM:
        return
    import numpy as np
    from matplotlib.scale import FuncScale

    edge = 103.0
    functions = (
        lambda score: -np.log10(np.maximum(edge - score, 0.1)),
        lambda place: edge - 10.0**-place,
    )
    axis.set_yscale(FuncScale(axis, functions))
    low = min(scores)
    floor = max(low - max(0.15 * (edge - low), 3.0), -5.0)
    ticks = [t for t in (0, 20, 40, 60, 70, 80, 85, 90, 95, 98, 99, 100) if t >= floor]
    axis.set_yticks(ticks, [str(tick) for tick in ticks])
    axis.set_ylim(floor, 100.3)


def _score_panel(name: str, title: str, cost_of: Callable[[Row], float | None], cost: str) -> Panel:
    """Make the picture of all curves' scores against a cost."""

    def draw(axis: Any, comparison: Comparison) -> bool:
        return draw_scores(axis, comparison, cost_of, cost)

    return Panel(name=name, title=f"Score against {title}", draw=draw, height=CURVES_HEIGHT)


CURVES_HEIGHT = 5.4
LATENCY = _score_panel(
    "score-seconds",
    "seconds per problem",
    lambda row: median(row.seconds_per_problem),
    "seconds per problem (left is faster)",
)
PANELS = (
    Panel(name="speed", title="Tokens per second at batch 1", draw=draw_bars),
    _score_panel(
        "score-speed",
        "tokens per second",
        lambda row: median(row.tokens_per_second),
        "tokens per second",
    ),
    LATENCY,
    _score_panel("score-parallelism", "tokens per forward", parallelism, "tokens per forward"),
)
"""The pictures of `d2f report`."""
