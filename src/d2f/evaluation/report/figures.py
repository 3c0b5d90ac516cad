"""The report's pictures: a panel for each family and test set."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2f.evaluation.plot import HIGHLIGHT, MUTED, new_figure, trim
from d2f.evaluation.report.ablations import batch_series, by_block_size
from d2f.evaluation.report.curves import D2F, areas, parallelism, score_curves
from d2f.evaluation.report.paper import (
    LABEL,
    PaperRow,
    ablation_counterpart,
    counterparts,
    load_paper,
    over_autoregressive,
)
from d2f.evaluation.report.results import Comparison, Row, Spread
from d2f.evaluation.report.table import median, significant, times

DPI = 110
NUM_COLORS = 128
_STRETCH_FROM = 80.0
_LOG_FROM = 20.0
"""Longest over shortest bar from which on the axis is logarithmic."""
_LEGEND_BELOW = ("figure2", "score-seconds", "score-parallelism")
_FAST_DLLM = ("fast-dllm-parallel", "fast-dllm-prefix", "fast-dllm-dual")
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
class Drawing:
    """A picture that was written."""

    file: str
    """Its name in the report's folder."""
    title: str


Panel = Callable[[Any, Comparison], bool]
"""Draws a comparison on axes; False where its rows are not there."""


def draw_figures(comparisons: Sequence[Comparison], folder: Path, *, paper: bool) -> list[Drawing]:
    """Write all pictures whose rows are there.

    Args:
        comparisons: What to draw, a panel each.
        folder: Where the PNG files go.
        paper: Draw the paper's points too, hollow.

    Raises:
        ConfigError: matplotlib is not installed.

    Example:
        `draw_figures(results.comparisons, Path("report"), paper=True)[0].file`
    """
    panels: tuple[tuple[str, str, Panel], ...] = (
        ("figure1", "Tokens per second at batch 1", lambda a, c: _bars(a, c, paper)),
        ("figure2", "Score against tokens per second", lambda a, c: _throughput(a, c, paper)),
        ("score-seconds", "Score against seconds per problem", _latency),
        ("score-parallelism", "Score against tokens per forward", _parallelism),
        ("figure5", "Block size", _block_size),
        ("batch", "Tokens per second by batch size", _batch),
    )
    drawings = []
    for name, title, panel in panels:
        drawn = [c for c in comparisons if _can_draw(panel, c)]
        if drawn:
            _write(name, folder, title, panel, drawn)
            drawings.append(Drawing(file=f"{name}.png", title=title))
    return drawings


def _can_draw(panel: Panel, comparison: Comparison) -> bool:
    return panel(_axes(1, 4)[1][0], comparison)


def _axes(count: int, height: float) -> tuple[Any, list[Any]]:
    columns = min(count, 2)
    rows = -(-count // columns)
    figure = new_figure(6.4 * columns, height * rows + 0.3, without="--no-figures")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def _write(
    name: str, folder: Path, title: str, panel: Panel, comparisons: Sequence[Comparison]
) -> None:
    figure, axes = _axes(len(comparisons), 5.4 if name in _LEGEND_BELOW else 4.0)
    for axis, comparison in zip(axes, comparisons, strict=True):
        panel(axis, comparison)
        trim(axis)
        axis.set_title(comparison.title, fontsize=11)
    figure.suptitle(title, fontsize=13)
    from PIL import Image  # matplotlib writes its own PNG files with it

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png")
    path = folder / f"{name}.png"
    part = path.with_name(path.name + ".part")
    # A palette makes the file a third as large; reports are committed.
    Image.open(drawn).convert("RGB").quantize(NUM_COLORS).save(part, format="png", optimize=True)
    part.replace(path)


def _look(method: str) -> tuple[str, str]:
    return _LOOKS.get(method, ("#000000", "*"))


# ----------------------------------------------------------------------------------- figure 1


def _bars(axis: Any, comparison: Comparison, paper: bool) -> bool:
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
            (speed.highest, place - (0.2 if paper else 0)),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
        )
    axis.invert_yaxis()
    axis.set_xlabel("tokens per second" + (" (x autoregression)" if base else ""))
    shown = [value for speed in speeds for value in (speed.lowest, speed.highest)]
    if paper:
        shown += _paper_bars(axis, comparison, rows)
    _bar_axis(axis, min(shown), max(shown))
    return True


def _bar_axis(axis: Any, shortest: float, longest: float) -> None:
    """Room for the numbers at the bars' ends; logarithmic where the shortest would not be seen."""
    if longest < _LOG_FROM * shortest:
        axis.set_xlim(0, 1.35 * longest)
        return
    axis.set_xscale("log")
    start = 10 ** math.floor(math.log10(shortest))
    axis.set_xlim(start, longest * (longest / start) ** 0.35)
    _plain_ticks(axis.xaxis, per_decade=(1,))


def _bar_rows(comparison: Comparison) -> list[Row]:
    """Vanilla, the best of Fast-dLLM, autoregression, D2F; as the paper's figure has them."""
    timed = [row for row in comparison.of("methods") if row.tokens_per_second]
    found = []
    for methods in (("vanilla",), _FAST_DLLM, ("autoregressive",), ("pipelined",)):
        rows = [row for row in timed if row.method in methods]
        if rows:
            found.append(max(rows, key=lambda row: median(row.tokens_per_second) or 0))
    return found


def _paper_bars(axis: Any, comparison: Comparison, rows: Sequence[Row]) -> list[float]:
    """The paper's ratios to autoregression, times our autoregression; returns them."""
    base = next((r.tokens_per_second for r in rows if r.method == "autoregressive"), None)
    counterpart = ablation_counterpart(comparison.task)
    if base is None or counterpart is None:
        return []
    families = {found.family for found in counterparts(comparison.task, comparison.family)}
    drawn: dict[str, list[tuple[float, float]]] = {}
    for place, row in enumerate(rows):
        method = "fast-dllm" if row.method in _FAST_DLLM else row.method
        for family, value in over_autoregressive(counterpart.test_set, method).items():
            if family in families:
                drawn.setdefault(family, []).append((value * base.median, place + 0.2))
    for family, points in drawn.items():
        axis.plot(
            *zip(*points, strict=True),
            label=f"{LABEL}, {family}: x LLaMA3, times our autoregression",
            **_hollow("black", "o" if family == "LLaDA" else "^"),
        )
    if drawn:
        axis.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1, frameon=False, fontsize=8
        )
    return [value for points in drawn.values() for value, _ in points]


# ----------------------------------------------------------------- figure 2 and its companions


def _throughput(axis: Any, comparison: Comparison, paper: bool) -> bool:
    """Figure 2; with the paper's points both are relative, as machines and tasks differ."""
    base = comparison.find("autoregressive")
    best = comparison.find("vanilla")
    speed = median(base.tokens_per_second) if base else None
    score = best.score if best else None
    points = _paper_points(comparison) if paper and speed and score is not None else []
    scale, shift = (speed or 1.0, score or 0.0) if points else (1.0, 0.0)
    drawn = _curves(
        axis, comparison, lambda row: median(row.tokens_per_second), scale=scale, shift=shift
    )
    for method in dict.fromkeys(point.method for point in points):
        _paper_curve(axis, method, points)
    axis.set_xlabel("tokens per second" + (" / those of autoregression" if points else ""))
    if points:
        axis.set_ylabel("score - vanilla's, points")
        _stretch_around_zero(axis)
    else:
        _score_axis(axis, comparison)
    _finish(axis, drawn)
    return drawn


def _paper_points(comparison: Comparison) -> list[PaperRow]:
    counterpart = ablation_counterpart(comparison.task)
    if counterpart is None:
        return []
    return [
        point
        for point in load_paper()
        if point.table == "figure2" and point.test_set == counterpart.test_set
    ]


def _paper_curve(axis: Any, method: str, points: Sequence[PaperRow]) -> None:
    """Relative to LLaMA3's tokens/s and to vanilla's score at all 512 steps."""
    base = next(p for p in points if p.method == "autoregressive" and p.family == "LLaDA")
    best = max(p.score or 0 for p in points if p.method == "vanilla")
    curve = [p for p in points if p.method == method]
    color, marker = _look(method)
    axis.plot(
        [(p.tokens_per_second or 0) / (base.tokens_per_second or 1) for p in curve],
        [(p.score or 0) - best for p in curve],
        label=f"{method} ({LABEL})",
        **_hollow(color, marker) | ({} if method == "autoregressive" else {"linestyle": ":"}),
    )


def _latency(axis: Any, comparison: Comparison) -> bool:
    drawn = _curves(axis, comparison, lambda row: median(row.seconds_per_problem))
    axis.set_xlabel("seconds per problem (left is faster)")
    _score_axis(axis, comparison)
    _finish(axis, drawn)
    return drawn


def _parallelism(axis: Any, comparison: Comparison) -> bool:
    found = areas(score_curves(comparison))
    drawn = _curves(axis, comparison, parallelism, notes=found)
    axis.set_xlabel("tokens per forward")
    _score_axis(axis, comparison)
    _finish(axis, drawn)
    return drawn


def _curves(
    axis: Any,
    comparison: Comparison,
    cost_of: Callable[[Row], float | None],
    *,
    scale: float = 1.0,
    shift: float = 0.0,
    notes: Mapping[str, float] | None = None,
) -> bool:
    """Every curve's points with the standard errors of their scores; False without any."""
    drawn = False
    for curve in score_curves(comparison):
        rows = [row for row in curve.rows if cost_of(row) and row.score is not None]
        if not rows:
            continue
        drawn = True
        color, marker = _look(curve.method)
        area = (notes or {}).get(curve.name)
        axis.errorbar(
            [(cost_of(row) or 0) / scale for row in rows],
            [(row.score or 0) - shift for row in rows],
            yerr=[row.standard_error or 0 for row in rows],
            color=color,
            # The line through many settings, and the row of the tables beside it.
            marker="." if curve.name == D2F else marker,
            markersize=8,
            linestyle="none" if len(rows) == 1 else "-",
            linewidth=1.5,
            elinewidth=0.8,
            capsize=2,
            label=curve.name if area is None else f"{curve.name}, AUP {significant(area)}",
        )
    return drawn


def _finish(axis: Any, drawn: bool) -> None:
    if not drawn:
        return
    axis.grid(alpha=0.3)
    axis.set_xscale("log")
    _plain_ticks(axis.xaxis)
    # Below the axes: the points fill any corner.
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, fontsize=8)


def _plain_ticks(axis: Any, per_decade: Sequence[int] = (1, 2, 5)) -> None:
    """Of a logarithmic axis: plain numbers at some places of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=per_decade))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _score_axis(axis: Any, comparison: Comparison) -> None:
    """Percent; where scores come close to 100, stretched there, or all that counts is one line."""
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


def _stretch_around_zero(axis: Any) -> None:
    """Differences of a point and of fifty points in one picture."""
    axis.set_yscale("symlog", linthresh=5)
    ticks = (-50, -20, -10, -5, 0, 5, 10, 20)
    low, high = axis.get_ylim()
    kept = [tick for tick in ticks if low <= tick <= high]
    axis.set_yticks(kept, [f"{tick:+d}" if tick else "0" for tick in kept])


def _hollow(color: str, marker: str) -> dict[str, Any]:
    return {
        "color": color,
        "marker": marker,
        "markerfacecolor": "white",
        "markeredgecolor": color,
        "markersize": 7,
        "linestyle": "none",
    }


# ------------------------------------------------------------------ block sizes, batch sizes


def _block_size(axis: Any, comparison: Comparison) -> bool:
    rows = [row for row in by_block_size(comparison) if row.tokens_per_second]
    if not rows:
        return False
    sizes = [str(row.setting("block_size")) for row in rows]
    speeds = [row.tokens_per_second or Spread(0, 0, 0) for row in rows]
    axis.errorbar(
        sizes,
        [speed.median for speed in speeds],
        yerr=[
            [speed.median - speed.lowest for speed in speeds],
            [speed.highest - speed.median for speed in speeds],
        ],
        color=HIGHLIGHT,
        marker="D",
        capsize=2,
        label="tokens per second (left)",
    )
    axis.set_xlabel("block size, tokens")
    axis.set_ylabel("tokens per second")
    axis.set_ylim(bottom=0)
    handles, labels = axis.get_legend_handles_labels()
    if all(row.score is not None for row in rows):
        other = axis.twinx()
        other.errorbar(
            sizes,
            [row.score for row in rows],
            yerr=[row.standard_error or 0 for row in rows],
            color="#0072b2",
            marker="s",
            linestyle="--",
            capsize=2,
            label="score, % (right)",
        )
        other.set_ylabel("score, %")
        other.spines["top"].set_visible(False)
        axis.set_zorder(other.get_zorder() + 1)
        axis.patch.set_visible(False)
        more = other.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    axis.legend(
        handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False,
        fontsize=8,
    )  # fmt: skip
    return True


def _batch(axis: Any, comparison: Comparison) -> bool:
    series = batch_series(comparison)
    if not series:
        return False
    for method, speeds in series.items():
        color, marker = _look(method)
        sizes = sorted(speeds)
        axis.plot(
            sizes,
            [median(speeds[size].tokens_per_second) for size in sizes],
            color=color,
            marker=marker,
            label=method,
        )
    sizes = sorted({size for speeds in series.values() for size in speeds})
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.set_yscale("log")
    _plain_ticks(axis.yaxis)
    axis.set_xlabel("batch size")
    axis.set_ylabel("tokens per second")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=9)
    return True
