"""The tables of a report: methods side by side, and settings of one method side by side."""

from __future__ import annotations

from typing import Any

from d2f.engine.policy import STRATEGIES
from d2f.evaluation.report import table as show
from d2f.evaluation.report.rows import Comparison, Difference, Row, Spread, paired_difference
from d2f.evaluation.report.table import Column, Table, median, ratio

METHOD = Column("label", "method", is_number=False)
SPEED = Column("tokens_per_second", "tokens/s (lowest–highest)", show.spread)
YIELD = Column("tokens_per_forward", "tokens/forward", show.significant)
LATENCY = Column("seconds_per_problem", "s/problem", show.significant)
LENGTH = Column("mean_tokens", "tokens/answer", show.significant)
SCORE = Column("score_text", "score ± se, % (n)")
OVER_AUTOREGRESSIVE = Column("over_autoregressive", "x autoregressive", show.times)
OVER_VANILLA = Column("over_vanilla", "x vanilla", show.times)
LATENCY_OVER_VANILLA = Column("latency_over_vanilla", "x vanilla's latency", show.times)
_MAIN = (
    METHOD,
    SPEED,
    OVER_AUTOREGRESSIVE,
    OVER_VANILLA,
    LATENCY,
    LATENCY_OVER_VANILLA,
    LENGTH,
    SCORE,
    Column("over_twin", "score - autoregressive's, points [95%] (n)", show.paired),
    Column("difference", "score - teacher's, points [95%] (n)", show.paired),
)
_REASONS = (
    METHOD,
    Column("tokens_per_forward", "tokens/forward, all", show.significant),
    Column("mean_of_tokens_per_forward", "mean of problems'", show.significant),
    Column("forwards_per_problem", "forwards/problem", show.significant),
    Column("query_tokens_per_forward", "query tokens/forward", show.significant),
    Column("milliseconds_per_forward", "ms/forward", show.significant),
    Column("computed_per_answered", "computed/answered", show.significant),
    Column("decoded_per_answered", "decoded/answered", show.significant),
    Column("made_of", "x autoregressive = tokens/forward × forwards/s"),
)
_SETTINGS = (
    METHOD,
    Column("model", "model", is_number=False),
    Column("settings", "settings", is_number=False),
    Column("grid", "chosen from", is_number=False),
    Column("num_timed", "problems timed × runs"),
    Column("decode_tokens_per_second", "tokens/s, decode only", show.spread),
)


def method_tables(comparison: Comparison) -> list[Table]:
    """Make the tables of the experiment `methods`: results, what makes the ratios, settings."""
    rows = comparison.of("methods")
    if not rows:
        return []
    lines = [method_line(row, comparison) for row in rows]
    teacher = comparison.find("vanilla", "vanilla-eos-stop")
    notes = [
        "Speed at batch 1, one problem at a time, prompts included, median of the runs. "
        "Latency is seconds per problem; its ratio is vanilla's over the row's.",
        "Differences of scores are paired"
        + (f"; the teacher is {teacher.label}." if teacher else "."),
        *(
            f"**Warning: the speed of {row.label} was measured at batch {row.speed_batch_size}.**"
            for row in rows
            if row.speed_batch_size not in (None, 1)
        ),
        *show.remarks(rows),
    ]
    title = comparison.title
    return [
        Table(name="methods", title=f"Methods: {title}", columns=_MAIN, lines=lines, notes=notes),
        Table(
            name="reasons",
            title=f"What makes the ratio: {title}",
            columns=_REASONS,
            lines=lines,
            notes=[
                "tokens/forward: ratio of sums, and mean of the problems' ratios. "
                "computed/answered: query tokens computed for each token of an answer; "
                "decoded/answered: tokens decoded, those behind the answer's end too."
            ],
        ),
        Table(name="settings", title=f"Settings: {title}", columns=_SETTINGS, lines=lines),
    ]


def varied_table(comparison: Comparison, experiment: str) -> Table | None:
    """Make the table of an experiment that varies settings, if it was run: rows against the first.

    The columns begin with the labels that the recipe gives its rows, as `add_threshold`.
    """
    rows = sorted(comparison.of(experiment), key=_label_order)
    if not rows:
        return None
    first = rows[0]
    lines = [
        {
            **row.summary["labels"],
            **base_line(row, None),
            "over_first": speed_ratio(row, first),
            "difference": _lead(row, first),
        }
        for row in rows
    ]
    labels = dict.fromkeys(key for row in rows for key in row.summary["labels"])
    columns = [
        METHOD,
        *(Column(key, key.replace("_", " ")) for key in labels),
        SPEED,
        Column("over_first", "x first", show.times),
        YIELD,
        LATENCY,
        SCORE,
        Column("difference", "score - first's, points [95%] (n)", show.paired),
    ]
    return Table(
        name=experiment,
        title=f"{experiment.capitalize()}: {comparison.title}",
        columns=columns,
        lines=lines,
        notes=show.remarks(rows),
    )


def _label_order(row: Row) -> list[tuple[str, float, str]]:
    """Sort rows by method, then by their labels: numbers by size, words by letter."""
    return [(row.method, 0.0, "")] + [
        ("", value, "") if isinstance(value, int | float) else ("", 0.0, str(value))
        for value in row.summary["labels"].values()
    ]


def method_line(row: Row, comparison: Comparison) -> dict[str, Any]:
    """Make the line of a row, by the keys of the columns."""
    autoregressive = comparison.find("autoregressive")
    vanilla = comparison.find("vanilla")
    teacher = comparison.find("vanilla", "vanilla-eos-stop")
    speed, grid = row.summary["speed"], row.summary["grid"]
    return {
        **base_line(row, vanilla),
        "over_autoregressive": speed_ratio(row, autoregressive),
        "over_twin": _lead(row, autoregressive),
        "difference": _lead(row, teacher),
        **{column.key: row.number(column.key) for column in _REASONS[1:-1]},
        "forwards_per_problem": ratio(row.number("mean_tokens"), row.number("tokens_per_forward")),
        "decoded_per_answered": row.decoded_per_answered,
        "made_of": _made_of(row, autoregressive),
        "model": row.summary["model"].get("name"),
        "settings": settings_text(row),
        "grid": f"{grid.get('tried', '?')} settings, on {grid.get('where', 'other problems')}"
        if grid
        else None,
        "num_timed": f"{speed['num_problems']} × {speed['num_runs']}"
        if {"num_problems", "num_runs"} <= speed.keys()
        else None,
        "decode_tokens_per_second": Spread.of(speed.get("decode_tokens_per_second")),
    }


def _lead(row: Row, other: Row | None) -> Difference | None:
    return None if other is None or row is other else paired_difference(row, other)


def base_line(row: Row, vanilla: Row | None) -> dict[str, Any]:
    """Give speed, latency, length and score of a row, and the first two against vanilla's."""
    seconds = median(row.seconds_per_problem)
    base = median(vanilla.seconds_per_problem) if vanilla else None
    return {
        "row": row.name,
        "method": row.method,
        "label": row.label,
        "tokens_per_second": row.tokens_per_second,
        "over_vanilla": speed_ratio(row, vanilla),
        "seconds_per_problem": seconds,
        "latency_over_vanilla": ratio(base, seconds),
        "mean_tokens": row.number("mean_tokens"),
        "tokens_per_forward": row.number("tokens_per_forward"),
        "score": row.score,
        "score_text": score_text(row),
    }


def speed_ratio(row: Row | None, other: Row | None) -> float | None:
    """Divide the median tokens/s of two rows."""
    if row is None or other is None:
        return None
    return ratio(median(row.tokens_per_second), median(other.tokens_per_second))


def score_text(row: Row) -> str | None:
    """Write score, standard error and number of problems."""
    if row.score is None:
        return None
    return f"{row.score:.1f} ± {row.standard_error or 0:.1f} ({row.num_scored})"


def settings_text(row: Row) -> str:
    """Write strategy, policy and options in one line."""
    summary, strategy = row.summary, row.summary.get("strategy")
    record = STRATEGIES.get(strategy or "")
    policy = summary["policy"]
    effective = policy if record is None else {*record.heeds, *record.fixes}
    found = {key: value for key, value in policy.items() if key in effective}
    found |= summary["options"] | {"max_new_tokens": row.room[0]}
    parts = [str(strategy)] if strategy else []
    parts += [f"{key}={value}" for key, value in found.items() if value is not None]
    parts += ["no stop at EOS"] if row.room[1] is False else []
    return ", ".join(parts) or show.NOTHING


def _made_of(row: Row, base: Row | None) -> str | None:
    """Take the ratio of tokens/s apart: tokens/forward × forwards/s."""
    if base is None:
        return None
    tokens = ratio(row.number("tokens_per_forward"), base.number("tokens_per_forward"))
    key = "milliseconds_per_forward"
    forwards = ratio(base.number(key), row.number(key))
    if tokens is None or forwards is None:
        return None
    return f"{show.significant(tokens)} × {show.significant(forwards)}"
