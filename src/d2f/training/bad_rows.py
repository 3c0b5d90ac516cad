"""Rows of a data set that cannot be trained on: counted by reason, with the first row numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from d2f.errors import unknown_name

_RECORDED = 100
_SHOWN = 5
_MAX_COLUMNS = 100
_MAX_REASONS = 50


class BadRow(Exception):
    """One row cannot be used; the message is the reason, without the row's number."""


@dataclass(kw_only=True)
class BadRows:
    """How many rows were bad, why, and which came first.

    Example:
        >>> bad = BadRows()
        >>> bad.add("a.jsonl:3", "not valid JSON")
        >>> bad.count, bad.text()
        (1, '1 × not valid JSON (a.jsonl:3)')
    """

    counts: dict[str, int] = field(default_factory=dict)
    """Rows by reason."""
    first: dict[str, list[str]] = field(default_factory=dict)
    """The first rows of each reason, as `file:line` or `data set:row`, counted from 1."""
    columns: set[str] = field(default_factory=set, compare=False)
    """Names of columns that bad rows have."""

    @property
    def count(self) -> int:
        """Bad rows of all reasons."""
        return sum(self.counts.values())

    def add(self, where: str, reason: str, row: object = None) -> None:
        """Count a row."""
        if reason not in self.counts and len(self.counts) >= _MAX_REASONS:
            reason = "other reasons"
        self.counts[reason] = self.counts.get(reason, 0) + 1
        rows = self.first.setdefault(reason, [])
        if len(rows) < _RECORDED:
            rows.append(where)
        if isinstance(row, Mapping) and len(self.columns) < _MAX_COLUMNS:
            self.columns.update(str(name) for name in row)

    def clear(self) -> None:
        """Forget all, before the rows are read anew."""
        self.counts.clear()
        self.first.clear()
        self.columns.clear()

    def text(self) -> str:
        """The reasons with their counts and first rows, in one line."""
        parts = []
        for reason, count in self.counts.items():
            rows = self.first[reason][:_SHOWN]
            more = ", …" if count > len(rows) else ""
            parts.append(f"{count:,} × {reason} ({', '.join(rows)}{more})")
        return "; ".join(parts)

    def to_table(self) -> dict[str, Any]:
        """Counts and first rows as JSON values."""
        return {"counts": self.counts, "first": self.first}

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> BadRows:
        """What `to_table` wrote."""
        return cls(counts=dict(table["counts"]), first=dict(table["first"]))


def missing_column(name: str, columns: list[str]) -> str:
    """Word that a data set lacks a mapped column, with the nearest of those that it has.

    Example:
        >>> missing_column("respone", ["prompt", "response"])
        "unknown column 'respone'; did you mean 'response'? Known: prompt, response. Map the \
columns in [data.columns]"
    """
    return f"{unknown_name('column', name, columns)}. Map the columns in [data.columns]"
