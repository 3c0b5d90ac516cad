"""The figures of `d2f report` with the paper's points in them, hollow, and those of ablations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from d2f.evaluation.plot import HIGHLIGHT
from d2f.evaluation.report.curves import parallelism, score_curves
from d2f.evaluation.report.figures import (
    CURVES_HEIGHT,
    FAST_DLLM,
    LATENCY,
    Panel,
    draw_bars,
    draw_curves,
    draw_scores,
    finish,
    look,
    plain_ticks,
)
from d2f.evaluation.report.rows import Comparison, Row, Spread
from d2f.evaluation.report.table import median, significant

from .ablations import batch_series, by_block_size
from .aup import areas
from .published import (
    LABEL,
    PaperRow,
    ablation_counterpart,
    counterparts,
    load_paper,
    over_autoregressive,
)


def _bars(axis: Any, comparison: Comparison) -> bool:
    return draw_bars(axis, comparison, _paper_bars)


def _paper_bars(axis: Any, comparison: Comparison, rows: Sequence[Row]) -> list[float]:
    """The paper's ratios to autoregression, times our autoregression; returns them."""
    base = next((r.tokens_per_second for r in rows if r.method == "autoregressive"), None)
    counterpart = ablation_counterpart(comparison.task)
    if base is None or counterpart is None:
        return []
    families = {found.family for found in counterparts(comparison.task, comparison.family)}
    drawn: dict[str, list[tuple[float, float]]] = {}
    for place, row in enumerate(rows):
        method = "fast-dllm" if row.method in FAST_DLLM else row.method
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


def _throughput(axis: Any, comparison: Comparison) -> bool:
    """Figure 2. With the paper's points both axes are relative, as machines and tasks differ."""
    base, best = comparison.find("autoregressive"), comparison.find("vanilla")
    speed = median(base.tokens_per_second) if base else None
    score = best.score if best else None
    points = _paper_points(comparison) if speed and score is not None else []
    if not points or speed is None or score is None:
        return draw_scores(
            axis, comparison, lambda row: median(row.tokens_per_second), "tokens per second"
        )
    drawn = draw_curves(
        axis,
        comparison,
        lambda row: (median(row.tokens_per_second) or 0) / speed,
        lambda row: (row.score or 0) - score,
    )
    for method in dict.fromkeys(point.method for point in points):
        _paper_curve(axis, method, points)
    axis.set_xlabel("tokens per second / those of autoregression")
    axis.set_ylabel("score - vanilla's, points")
    _stretch_around_zero(axis)
    finish(axis, drawn)
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
    color, marker = look(method)
    axis.plot(
        [(p.tokens_per_second or 0) / (base.tokens_per_second or 1) for p in curve],
        [(p.score or 0) - best for p in curve],
        label=f"{method} ({LABEL})",
        **_hollow(color, marker) | ({} if method == "autoregressive" else {"linestyle": ":"}),
    )


def _parallelism(axis: Any, comparison: Comparison) -> bool:
    found = areas(score_curves(comparison))

    def name_of(curve: Any) -> str:
        area = found.get(curve.name)
        return curve.name if area is None else f"{curve.name}, AUP {significant(area)}"

    return draw_scores(axis, comparison, parallelism, "tokens per forward", name_of)


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
        color, marker = look(method)
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
    plain_ticks(axis.yaxis)
    axis.set_xlabel("batch size")
    axis.set_ylabel("tokens per second")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=9)
    return True


PANELS = (
    Panel(name="figure1", title="Tokens per second at batch 1", draw=_bars),
    Panel(
        name="figure2",
        title="Score against tokens per second",
        draw=_throughput,
        height=CURVES_HEIGHT,
    ),
    LATENCY,
    Panel(
        name="score-parallelism",
        title="Score against tokens per forward",
        draw=_parallelism,
        height=CURVES_HEIGHT,
    ),
    Panel(name="figure5", title="Block size", draw=_block_size),
    Panel(name="batch", title="Tokens per second by batch size", draw=_batch),
)
