"""A table that can be read as plain text, as Markdown and as JSON; and how its numbers look."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2f.evaluation.report.rows import Difference, Row, Spread

NOTHING = "–"


def significant(value: float) -> str:
    """Write three digits, or all before the point.

    Example:
        >>> [significant(x) for x in (1234.5, 52.49, 7.2, 0.8, 0)]
        ['1234', '52.5', '7.20', '0.800', '0']
    """
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 99.95:
        return f"{value:.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.9995 else f"{value:#.3g}"


def times(value: float) -> str:
    """Write a ratio."""
    return f"{significant(value)}x"


def spread(value: Spread) -> str:
    """Write a median, and the lowest and the highest run.

    Example:
        >>> spread(Spread(52.5, 51.0, 53.25))
        '52.5 (51.0–53.2)'
    """
    low, high = significant(value.lowest), significant(value.highest)
    return f"{significant(value.median)} ({low}–{high})"


def points(value: float) -> str:
    """Write a score in percent."""
    return f"{value:.1f}"


def interval(value: Difference) -> str:
    """Write a difference and the ends of its 95% interval.

    Example:
        >>> interval(Difference(0.5, -0.25, 1.25, 1000))
        '+0.5 [-0.2, +1.2]'
    """
    return f"{value.mean:+.1f} [{value.low:+.1f}, {value.high:+.1f}]"


def paired(value: Difference) -> str:
    """Write a difference, its 95% interval and the number of pairs."""
    return f"{interval(value)} ({value.num_pairs})"


@dataclass(frozen=True)
class Column:
    """One column: where its values are in a line, what stands above, how they look."""

    key: str
    header: str
    form: Callable[[Any], str] = str
    is_number: bool = True

    def show(self, line: Mapping[str, Any]) -> str:
        """Write the cell of a line."""
        value = line.get(self.key)
        return NOTHING if value is None else self.form(value)


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of the report.

    Example:
        >>> table = Table(name="x", title="X", columns=[Column("n", "count")], lines=[{"n": 7}])
        >>> print(table.markdown())
        | count |
        | ----: |
        |     7 |
    """

    name: str
    """Name of the table in the JSON file."""
    title: str
    columns: Sequence[Column]
    lines: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = ()
    """Sentences below the table."""

    def markdown(self) -> str:
        """Write the table in Markdown, padded so that it can be read without a browser."""
        cells = [[column.header for column in self.columns]]
        cells += [[column.show(line) for column in self.columns] for line in self.lines]
        cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in cells]
        padded = []
        for column, texts in zip(self.columns, zip(*cells, strict=True), strict=True):
            width, right = max(3, *map(len, texts)), column.is_number
            head, *body = (text.rjust(width) if right else text.ljust(width) for text in texts)
            padded.append([head, "-" * (width - right) + ":" * right, *body])
        return "\n".join(f"| {' | '.join(row)} |" for row in zip(*padded, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Give the table for the JSON file, with unrounded numbers."""
        keys = [column.key for column in self.columns]
        return {
            "name": self.name,
            "title": self.title,
            "columns": {column.key: column.header for column in self.columns},
            "rows": [{key: _plain(line.get(key)) for key in keys} for line in self.lines],
            "notes": list(self.notes),
        }


def ratio(one: float | None, other: float | None) -> float | None:
    """Divide one by the other, where both are there.

    Example:
        >>> ratio(6, 4), ratio(6, None), ratio(6, 0)
        (1.5, None, None)
    """
    return one / other if one is not None and other else None


def median(value: Spread | None) -> float | None:
    """Give the median of a spread that may be missing."""
    return value.median if value else None


def conditions(rows: Sequence[Row]) -> list[str]:
    """Warn of each condition in which rows of one table differ."""
    warnings = []
    for name, value_of in _CONDITIONS.items():
        found: dict[str, list[str]] = {}
        for row in rows:
            found.setdefault(str(value_of(row)), []).append(row.name)
        if len(found) > 1:
            parts = [f"{value} ({_some(names)})" for value, names in found.items()]
            warnings.append(f"**Warning: rows differ in {name}:** {'; '.join(parts)}")
    return warnings


def remarks(rows: Sequence[Row]) -> list[str]:
    """Tell below a table what was simulated, and how its rows differ."""
    found = []
    endless = dict.fromkeys(row.label for row in rows if row.room[1] is False)
    if endless and any(row.room[1] is not False for row in rows):
        names = ", ".join(endless)
        found.append(f"EOS does not end a problem of {names}; it does of all other rows.")
    if rows and all(_clean_up(row) == "paper" for row in rows):
        found.append("Programs were taken out of answers as the paper's authors do it.")
    found += [f"{row.label}: {row.simulated}." for row in rows if row.simulated]
    return found + conditions(rows)


def commit(environment: Mapping[str, Any]) -> str:
    """Name the commit that made a result, and tell whether the tree had changes."""
    name = str(environment.get("git_commit") or "unknown")[:12]
    return f"{name} with changes" if environment.get("git_dirty") else name


def _clean_up(row: Row) -> str:
    return row.summary["recipe"].get("clean_up") or "ours"


_CONDITIONS: Mapping[str, Callable[[Row], object]] = {
    "processor": lambda row: row.machine,
    "dtype": lambda row: row.environment.get("dtype"),
    "torch": lambda row: row.environment.get("torch"),
    "git commit": lambda row: commit(row.environment),
    "the clean-up of answers": _clean_up,
    "few-shot examples": lambda row: row.summary.get("num_fewshot"),
    "problems (seed, split)": lambda row: tuple(map(row.summary["recipe"].get, ("seed", "split"))),
}


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def _plain(value: Any) -> Any:
    return dict(value._asdict()) if hasattr(value, "_asdict") else value
