"""Tables 1 and 2: all methods on one test set, what makes their ratios, and their settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from d2f.evaluation.report import table as show
from d2f.evaluation.report.differences import Difference, paired_difference
from d2f.evaluation.report.paper import (
    LABEL,
    Counterpart,
    counterparts,
    over_autoregressive,
)
from d2f.evaluation.report.results import Comparison, Row
from d2f.evaluation.report.table import Column, Table, median, minus, ratio

_TAILS = (
    "The paper counts Dream's tokens with the tail behind the answer, and here answers are "
    "counted; `d2f report --count-tail` counts as the paper."
)
_METHOD = Column(key="label", header="method", is_number=False)
_OVER = Column(key="over_autoregressive", header="x autoregressive", form=show.times)
_MAIN = (
    _METHOD,
    Column(key="tokens_per_second", header="tokens/s (lowest–highest)", form=show.spread),
    _OVER,
    Column(key="over_vanilla", header="x vanilla", form=show.times),
    Column(key="seconds_per_problem", header="s/problem", form=show.significant),
    Column(key="latency_over_vanilla", header="x vanilla's latency", form=show.times),
    Column(key="mean_tokens", header="tokens/answer", form=show.significant),
    Column(key="score_text", header="score ± se, % (n)"),
    Column(key="over_twin", header="score - autoregressive's, points [95%] (n)", form=show.paired),
    Column(key="difference", header="score - teacher's, points [95%] (n)", form=show.paired),
)
_REASONS = (
    _METHOD,
    Column(key="tokens_per_forward", header="tokens/forward, all", form=show.significant),
    Column(key="mean_of_tokens_per_forward", header="mean of problems'", form=show.significant),
    Column(key="forwards_per_problem", header="forwards/problem", form=show.significant),
    Column(key="query_tokens_per_forward", header="query tokens/forward", form=show.significant),
    Column(key="milliseconds_per_forward", header="ms/forward", form=show.significant),
    Column(key="computed_per_answered", header="computed/answered", form=show.significant),
    Column(key="decoded_per_answered", header="decoded/answered", form=show.significant),
    Column(key="made_of", header="x autoregressive = tokens/forward × forwards/s"),
)
_SETTINGS = (
    _METHOD,
    Column(key="model", header="model", is_number=False),
    Column(key="settings", header="settings", is_number=False),
    Column(key="grid", header="chosen from", is_number=False),
    Column(key="num_timed", header="problems timed × runs"),
    Column(key="decode_tokens_per_second", header="tokens/s, decode only", form=show.spread),
)


def method_tables(comparison: Comparison, *, paper: bool) -> list[Table]:
    """The tables of `methods`; none where the experiment was not run.

    Args:
        comparison: One family on one test set.
        paper: Set the paper's ratios beside.

    Example:
        `print(method_tables(comparison, paper=True)[0].markdown())`
    """
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
        *show.beyond_eos(rows),
        *show.cleaned_up(rows),
        *show.simulated(rows),
        *_other_batches(rows),
        *show.conditions(rows),
    ]
    title = comparison.title
    tables = [
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
    if paper:
        tables += _beside(comparison, rows)
    return tables


def method_line(row: Row, comparison: Comparison) -> dict[str, Any]:
    """All that is told of a row, by the keys of the columns."""
    autoregressive = comparison.find("autoregressive")
    vanilla = comparison.find("vanilla")
    teacher = comparison.find("vanilla", "vanilla-eos-stop")
    speed = row.summary.get("speed") or {}
    return {
        **base_line(row, vanilla),
        "over_autoregressive": speed_ratio(row, autoregressive),
        "over_twin": _lead(row, autoregressive),
        "difference": _lead(row, teacher),
        **{column.key: row.number(column.key) for column in _REASONS[1:-1]},
        "forwards_per_problem": ratio(row.number("mean_tokens"), row.number("tokens_per_forward")),
        "decoded_per_answered": row.decoded_per_answered,
        "made_of": _made_of(row, autoregressive),
        "model": (row.summary.get("model") or {}).get("name"),
        "settings": settings_text(row),
        "grid": _grid_text(row.summary.get("grid")),
        "num_timed": f"{speed['num_problems']} × {speed['num_runs']}"
        if {"num_problems", "num_runs"} <= speed.keys()
        else None,
        "decode_tokens_per_second": row.decode_tokens_per_second,
    }


def _lead(row: Row, other: Row | None) -> Difference | None:
    return None if other is None or row is other else paired_difference(row, other)


def base_line(row: Row, vanilla: Row | None) -> dict[str, Any]:
    """Speed, latency, length and score of a row, and the first two against vanilla's."""
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
    """Median tokens/s of one over the other's."""
    if row is None or other is None:
        return None
    return ratio(median(row.tokens_per_second), median(other.tokens_per_second))


def score_text(row: Row) -> str | None:
    """Score, standard error and number of problems."""
    if row.score is None:
        return None
    return f"{row.score:.1f} ± {row.standard_error or 0:.1f} ({row.num_scored})"


def settings_text(row: Row) -> str:
    """Strategy, policy and options in one line."""
    summary = row.summary
    parts: list[str] = [str(summary["strategy"])] if summary.get("strategy") else []
    found: dict[str, Any] = {**(summary.get("policy") or {}), **(summary.get("options") or {})}
    if summary.get("max_new_tokens") is not None:
        found["max_new_tokens"] = summary["max_new_tokens"]
    parts += [f"{key}={value}" for key, value in found.items() if value is not None]
    if summary.get("early_stop") is False:
        parts.append("no stop at EOS")
    return ", ".join(parts) or show.NOTHING


def _grid_text(grid: Mapping[str, Any] | None) -> str | None:
    if not grid:
        return None
    return f"{grid.get('tried', '?')} settings, on {grid.get('where', 'other problems')}"


def _made_of(row: Row, base: Row | None) -> str | None:
    """Tokens/s are tokens/forward × forwards/s, so their ratios multiply too."""
    if base is None:
        return None
    tokens = ratio(row.number("tokens_per_forward"), base.number("tokens_per_forward"))
    key = "milliseconds_per_forward"
    forwards = ratio(base.number(key), row.number(key))
    if tokens is None or forwards is None:
        return None
    return f"{show.significant(tokens)} × {show.significant(forwards)}"


def _other_batches(rows: Sequence[Row]) -> list[str]:
    return [
        f"**Warning: the speed of {row.label} was measured at batch {row.speed_batch_size}.**"
        for row in rows
        if row.speed_batch_size not in (None, 1)
    ]


def _beside(comparison: Comparison, rows: Sequence[Row]) -> list[Table]:
    """Ratio against ratio: the machines and the sizes differ, so tokens/s cannot be compared."""
    stand = counterparts(comparison.task, comparison.family)
    if not stand:
        return []
    columns = [_METHOD, _OVER, *_ratio_columns("here", "here")]
    for counterpart in stand:
        columns += _ratio_columns(counterpart.family, counterpart.family)
        if over_autoregressive(counterpart.test_set, "autoregressive"):
            key, name = f"{counterpart.family}_figure1", counterpart.family
            columns.append(Column(key=key, header=f"{name}: x LLaMA3", form=show.times))
    vanilla = comparison.find("vanilla")
    lines = []
    for row in rows:
        line = base_line(row, vanilla)
        line["here_tps"] = line["over_vanilla"]
        line["here_latency"] = line["latency_over_vanilla"]
        line["here_score"] = minus(row.score, vanilla.score if vanilla else None)
        for counterpart in stand:
            line |= paper_ratios(counterpart, row.method)
            found = over_autoregressive(counterpart.test_set, row.method)
            line[f"{counterpart.family}_figure1"] = found.get(counterpart.family)
        line["over_autoregressive"] = speed_ratio(row, comparison.find("autoregressive"))
        lines.append(line)
    names = "; ".join(counterpart.name for counterpart in stand)
    dream = any(counterpart.family == "Dream" for counterpart in stand)
    return [
        Table(
            name="paper",
            title=f"Beside the paper: {comparison.title}",
            columns=columns,
            lines=lines,
            notes=[
                f"{LABEL}: {names}. Ratios and differences are to vanilla; x LLaMA3 is "
                "of figure 1, with 512 new tokens.",
                *([_TAILS] if dream and not comparison.counts_tail else []),
            ],
        )
    ]


def _ratio_columns(key: str, name: str) -> list[Column]:
    return [
        Column(key=f"{key}_tps", header=f"{name}: x tokens/s", form=show.times),
        Column(key=f"{key}_latency", header="x latency", form=show.times),
        Column(key=f"{key}_score", header="score, points", form=show.gap),
    ]


def paper_ratios(counterpart: Counterpart, method: str) -> dict[str, float | None]:
    """The paper's row of a method against its vanilla; nothing where there is none."""
    tables = ("table1", "table2", "table5", "table6", "table7")
    row, base = (counterpart.find(name, *tables) for name in (method, "vanilla"))
    if row is None or base is None:
        return {}
    name = counterpart.family
    return {
        f"{name}_tps": ratio(row.tokens_per_second, base.tokens_per_second),
        f"{name}_latency": ratio(base.seconds_per_problem, row.seconds_per_problem),
        f"{name}_score": minus(row.score, base.score),
    }
