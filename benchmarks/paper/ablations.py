"""Tables 3 to 7, figure 5 and the batch sizes: one thing varied at a time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from d2f.evaluation.report import table as show
from d2f.evaluation.report.curves import THRESHOLDS, by_thresholds, thresholds_of
from d2f.evaluation.report.methods import (
    LATENCY,
    LATENCY_OVER_VANILLA,
    LENGTH,
    METHOD,
    OVER_VANILLA,
    SCORE,
    SPEED,
    YIELD,
    base_line,
    speed_ratio,
)
from d2f.evaluation.report.rows import Comparison, Row, paired_difference
from d2f.evaluation.report.table import Column, Table, median, ratio
from d2f.evaluation.results import METHODS

from .methods import paper_ratios
from .published import (
    LABEL,
    Counterpart,
    PaperRow,
    ablation_counterpart,
    counterparts,
    gap,
    minus,
)

NOISE_LEVEL = THRESHOLDS[:2]


class NoiseGroup(NamedTuple):
    """The settings that rows of table 4 share if they differ in the seed alone."""

    activate: float
    confidence: float
    schedule: str


def threshold_table(comparison: Comparison) -> Table | None:
    """Table 3: the three thresholds against tokens/s and score; strictest first."""
    rows = by_thresholds(comparison)
    if not rows:
        return None
    counterpart = ablation_counterpart(comparison.task)
    published = _paper_thresholds(counterpart)
    # The strictest setting that the paper has too is 1 on both sides.
    common = next((row for row in rows if thresholds_of(row) in published), None)
    base, paper_base = common or rows[0], published.get(thresholds_of(common)) if common else None
    lines = []
    for row in rows:
        line = base_line(row, None)
        line |= dict(zip(THRESHOLDS, thresholds_of(row), strict=True))
        line["over_base"] = speed_ratio(row, base)
        line["difference"] = None if row is base else paired_difference(row, base)
        found = published.get(thresholds_of(row))
        if found is not None and paper_base is not None:
            line["paper_tps"] = ratio(found.tokens_per_second, paper_base.tokens_per_second)
            line["paper_score"] = minus(found.score, paper_base.score)
        lines.append(line)
    columns = [
        *(Column(key=key, header=key.removesuffix("_threshold")) for key in THRESHOLDS),
        SPEED,
        Column(key="over_base", header="x first", form=show.times),
        YIELD,
        LATENCY,
        SCORE,
        Column(key="difference", header="score - first's [95%] (n)", form=show.paired),
    ]
    if published:
        columns += [
            Column(key="paper_tps", header=f"{LABEL}: x first", form=show.times),
            Column(key="paper_score", header="score - first's", form=gap),
        ]
    first = ", ".join(map(str, thresholds_of(base)))
    notes = [f"First: activate, confidence, add = {first}.", *show.conditions(rows)]
    title = f"Thresholds: {comparison.title}"
    return Table(name="thresholds", title=title, columns=columns, lines=lines, notes=notes)


def noise_table(comparison: Comparison) -> Table | None:
    """Table 4: schedules of mask ratios, mean and standard deviation over seeds."""
    rows = comparison.of("noise")
    if not rows:
        return None
    counterpart = ablation_counterpart(comparison.task)
    published = counterpart.rows("pipelined", "table4") if counterpart else []
    groups = noise_groups(rows)
    lines = []
    for group, members in groups.items():
        base = groups.get(group._replace(schedule="random"))
        level, schedule = [group.activate, group.confidence], group.schedule
        line: dict[str, Any] = dict(zip(NOISE_LEVEL, level, strict=True))
        line["schedule"] = schedule
        line["num_seeds"] = len(members)
        for key, value_of in _NOISE_NUMBERS.items():
            line[key] = _mean_and_deviation([value_of(row) for row in members])
        speeds = [median(row.tokens_per_second) for row in members]
        base_speeds = [median(row.tokens_per_second) for row in base or ()]
        line["over_random"] = ratio(_mean(speeds), _mean(base_speeds))
        same = [p for p in published if [float(p.settings[k]) for k in NOISE_LEVEL] == level]
        by_schedule = {p.settings["schedule"]: p for p in same}
        if schedule in by_schedule and "random" in by_schedule:
            ours, theirs = by_schedule[schedule], by_schedule["random"]
            line["paper_tps"] = ratio(ours.tokens_per_second, theirs.tokens_per_second)
            line["paper_score"] = minus(ours.score, theirs.score)
        line["score_gap"] = minus(
            _mean([row.score for row in members]), _mean([row.score for row in base or ()])
        )
        lines.append(line)
    columns = [
        *(Column(key=key, header=key.removesuffix("_threshold")) for key in NOISE_LEVEL),
        Column(key="schedule", header="schedule", is_number=False),
        Column(key="num_seeds", header="seeds"),
        Column(key="tokens_per_second", header="tokens/s, mean ± sd"),
        Column(key="tokens_per_forward", header="tokens/forward, mean ± sd"),
        Column(key="score", header="score, %, mean ± sd"),
        Column(key="over_random", header="x random", form=show.times),
        Column(key="score_gap", header="score - random's", form=gap),
    ]
    if published:
        columns += [
            Column(key="paper_tps", header=f"{LABEL}: x random", form=show.times),
            Column(key="paper_score", header="score - random's", form=gap),
        ]
    notes = ["Standard deviations are over seeds of the training.", *show.conditions(rows)]
    title = f"Noise schedule: {comparison.title}"
    return Table(name="noise", title=title, columns=columns, lines=lines, notes=notes)


def noise_groups(rows: Sequence[Row]) -> dict[NoiseGroup, list[Row]]:
    """Seeds together, by confidence and activate threshold (strictest first) and schedule."""
    groups: dict[NoiseGroup, list[Row]] = {}
    for row in rows:
        activate, confidence = (float(row.setting(key) or 0) for key in NOISE_LEVEL)
        group = NoiseGroup(activate, confidence, str(row.setting("schedule")))
        groups.setdefault(group, []).append(row)
    return dict(
        sorted(
            groups.items(),
            key=lambda item: (-item[0].confidence, -item[0].activate, item[0].schedule),
        )
    )


def cache_table(comparison: Comparison) -> Table | None:
    """Tables 5 and 7: the cache alone (`serial`), and with decoding in parallel."""
    rows = [
        row
        for row in comparison.of("methods")
        if row.method in ("vanilla", "vanilla-eos-stop", "serial", "pipelined")
    ]
    if not {"serial", "pipelined"} <= {row.method for row in rows}:
        return None
    return _against_vanilla("cache", "Cache alone, and with parallelism", comparison, rows)


def control_table(comparison: Comparison) -> Table | None:
    """Table 6: the teacher, fine-tuned on the same data without D2F."""
    rows = comparison.of("control")
    if not rows:
        return None
    teacher = comparison.find("vanilla", experiment="control")
    if teacher is not None and teacher not in rows:
        rows = [teacher, *rows]
    return _against_vanilla("control", "Control, fine-tuned without D2F", comparison, rows)


def block_size_table(comparison: Comparison) -> Table | None:
    """Figure 5 in numbers; the paper shows it as a plot alone."""
    rows = by_block_size(comparison)
    if not rows:
        return None
    lines = [
        {
            **base_line(row, None),
            "block_size": row.setting("block_size"),
            "milliseconds_per_forward": row.number("milliseconds_per_forward"),
        }
        for row in rows
    ]
    columns = [
        Column(key="block_size", header="block size"),
        SPEED,
        YIELD,
        Column(key="milliseconds_per_forward", header="ms/forward", form=show.significant),
        LATENCY,
        SCORE,
    ]
    title = f"Block size: {comparison.title}"
    notes = show.conditions(rows)
    return Table(name="block-size", title=title, columns=columns, lines=lines, notes=notes)


def by_block_size(comparison: Comparison) -> list[Row]:
    """Rows of the experiment `block-size`, smallest first."""
    return sorted(comparison.of("block-size"), key=lambda row: int(row.setting("block_size") or 0))


def batch_table(comparison: Comparison) -> Table | None:
    """Tokens/s by batch size, and where autoregression overtakes."""
    series = batch_series(comparison)
    if not series:
        return None
    slow = series.get("autoregressive", {})
    others = [method for method in series if method != "autoregressive"]
    sizes = sorted({size for speeds in series.values() for size in speeds})
    lines: list[dict[str, Any]] = []
    for size in sizes:
        line: dict[str, Any] = {"batch_size": size}
        line |= {
            method: row.tokens_per_second for method in series if (row := series[method].get(size))
        }
        for method in others:
            line[f"{method}_ratio"] = speed_ratio(series[method].get(size), slow.get(size))
        lines.append(line)
    columns = [Column(key="batch_size", header="batch")]
    columns += [Column(key=m, header=f"{m}, tokens/s", form=show.spread) for m in series]
    notes = []
    if slow:
        columns += [
            Column(key=f"{m}_ratio", header=f"{m} x autoregressive", form=show.times)
            for m in others
        ]
        notes = [overtaking(method, lines) for method in others]
    notes += show.conditions([row for speeds in series.values() for row in speeds.values()])
    title = f"Batch size: {comparison.title}"
    return Table(name="batch", title=title, columns=columns, lines=lines, notes=notes)


def batch_series(comparison: Comparison) -> dict[str, dict[int, Row]]:
    """Rows of the experiment `batch` that have a speed, by method and batch size."""
    series: dict[str, dict[int, Row]] = {}
    for row in comparison.of("batch"):
        size = row.setting("batch_size") or row.speed_batch_size
        if size is not None and row.tokens_per_second is not None:
            series.setdefault(row.method, {})[int(size)] = row
    order = (*METHODS, *series)
    return dict(sorted(series.items(), key=lambda item: order.index(item[0])))


def overtaking(method: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """Say from which batch size on autoregression is faster than the method.

    Example:
        >>> overtaking("serial", [{"batch_size": 8, "serial_ratio": 0.5}])
        '**Autoregression overtakes serial from batch 8 on**; at batch 8 serial is 0.500x as fast.'
    """
    known = [
        (line["batch_size"], line[f"{method}_ratio"])
        for line in lines
        if line.get(f"{method}_ratio") is not None
    ]
    if not known:
        return f"{method} and autoregression have no batch size in common."
    reached = None
    for size, value in reversed(known):
        if value >= 1:
            break
        reached = size
    size, value = known[-1]
    tail = f"at batch {size} {method} is {show.times(value)} as fast."
    if reached is None:
        return f"Autoregression overtakes {method} at none of these batch sizes; {tail}"
    return f"**Autoregression overtakes {method} from batch {reached} on**; {tail}"


def _against_vanilla(name: str, heading: str, comparison: Comparison, rows: Sequence[Row]) -> Table:
    vanilla = comparison.find("vanilla", experiment=name)
    stand = counterparts(comparison.task, comparison.family)
    lines = []
    for row in rows:
        line = base_line(row, vanilla)
        line["difference"] = paired_difference(row, vanilla) if vanilla not in (None, row) else None
        for counterpart in stand:
            line |= paper_ratios(counterpart, row.method)
        lines.append(line)
    columns = [
        METHOD,
        SPEED,
        OVER_VANILLA,
        YIELD,
        LATENCY,
        LATENCY_OVER_VANILLA,
        LENGTH,
        SCORE,
        Column(key="difference", header="score - vanilla's [95%] (n)", form=show.paired),
    ]
    for counterpart in stand:
        key = counterpart.family
        columns += [
            Column(key=f"{key}_tps", header=f"{key}: x vanilla", form=show.times),
            Column(key=f"{key}_latency", header="x latency", form=show.times),
            Column(key=f"{key}_score", header="score, points", form=gap),
        ]
    names = "; ".join(counterpart.name for counterpart in stand)
    notes = [f"{LABEL}: {names}."] if stand else []
    notes += show.remarks(rows)
    title = f"{heading}: {comparison.title}"
    return Table(name=name, title=title, columns=columns, lines=lines, notes=notes)


def _paper_thresholds(counterpart: Counterpart | None) -> dict[tuple[float, ...], PaperRow]:
    found = counterpart.rows("pipelined", "table3") if counterpart else []
    return {tuple(float(row.settings[key]) for key in THRESHOLDS): row for row in found}


_NOISE_NUMBERS: Mapping[str, Any] = {
    "tokens_per_second": lambda row: median(row.tokens_per_second),
    "tokens_per_forward": lambda row: row.number("tokens_per_forward"),
    "score": lambda row: row.score,
}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _mean_and_deviation(values: Sequence[float | None]) -> str | None:
    known = [value for value in values if value is not None]
    mean = _mean(values)
    if mean is None:
        return None
    if len(known) < 2:
        return show.significant(mean)
    return f"{show.significant(mean)} ± {show.significant(statistics.stdev(known))}"
