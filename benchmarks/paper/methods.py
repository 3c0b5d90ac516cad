"""The paper's numbers beside our methods: ratio against ratio."""

from __future__ import annotations

from collections.abc import Sequence

from d2f.evaluation.report import table as show
from d2f.evaluation.report.methods import (
    METHOD,
    OVER_AUTOREGRESSIVE,
    base_line,
    method_tables,
    speed_ratio,
)
from d2f.evaluation.report.rows import Comparison, Row
from d2f.evaluation.report.table import Column, Table, ratio

from .published import LABEL, Counterpart, counterparts, gap, minus, over_autoregressive

_TAILS = (
    "The paper counts Dream's tokens with the tail behind the answer, and here answers are "
    "counted; `--count-tail` counts as the paper."
)


def tables_beside_paper(comparison: Comparison) -> list[Table]:
    """The tables of `methods`, and one that sets the paper's ratios beside."""
    tables = method_tables(comparison)
    return tables + _beside(comparison, comparison.of("methods")) if tables else []


def _beside(comparison: Comparison, rows: Sequence[Row]) -> list[Table]:
    """Ratio against ratio: the machines and the sizes differ, so tokens/s cannot be compared."""
    stand = counterparts(comparison.task, comparison.family)
    if not stand:
        return []
    columns = [METHOD, OVER_AUTOREGRESSIVE, *_ratio_columns("here", "here")]
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
        Column(key=f"{key}_score", header="score, points", form=gap),
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
