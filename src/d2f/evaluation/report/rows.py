"""The rows of `d2f eval`'s result files, and which of them may be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from d2f.evaluation.metrics import OF_TOKENS, mean_and_error
from d2f.evaluation.results import METHODS, read_lines


class Spread(NamedTuple):
    """A median of several runs, and the runs at both ends."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, known: Mapping[str, Any] | None) -> Spread | None:
        """Read the entry of a summary; None where it was not measured."""
        ends: list[Any] = [(known or {}).get(end) for end in cls._fields]
        return None if None in ends else cls(*map(float, ends))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One finished row: a method on a test set; None for what its results do not tell."""

    folder: Path
    summary: Mapping[str, Any]
    """Content of `summary.json`; a table that is missing there is empty here."""
    name: str
    """Name of the row and of its folder."""
    method: str
    """One of `METHODS`, or one of the user's own."""
    simulated: str | None
    """Words for what was not real, as random weights; None if all was real."""
    label: str
    """Name of the row in tables, which says if something was simulated."""
    environment: Mapping[str, Any]
    """The machine, the versions and the commit of the measurement."""
    machine: str
    """The processor."""
    room: tuple[Any, Any]
    """Most tokens of an answer, and whether EOS ends it sooner."""
    tokens_per_second: Spread | None
    """Answer tokens / wall time, end to end."""
    seconds_per_problem: Spread | None
    speed_batch_size: Any
    score: float | None
    """Share of right answers, in percent."""
    standard_error: float | None
    """Standard error of the score, in points."""
    digits: str
    """1 for each solved problem, 0 for the others, in order; empty without a score."""

    @classmethod
    def of(cls, folder: Path, summary: Mapping[str, Any]) -> Row:
        """Read the entries of a summary, which was found to be whole."""
        method, simulated = summary["method"], summary.get("simulated") or None
        speed, score, environment = (summary[key] for key in ("speed", "score", "environment"))
        shares = (score.get(key) for key in ("score", "standard_error"))
        percents = [None if share is None else 100 * float(share) for share in shares]
        label = str(summary.get("label") or method)
        return cls(
            folder=folder,
            summary=summary,
            name=summary["row"],
            method=method,
            simulated=simulated,
            label=f"{label} (simulated)" if simulated else label,
            environment=environment,
            machine=str(environment.get("processor", "unknown machine")),
            room=(summary.get("max_new_tokens"), summary.get("early_stop")),
            tokens_per_second=Spread.of(speed.get("tokens_per_second")),
            seconds_per_problem=Spread.of(speed.get("seconds_per_problem")),
            speed_batch_size=speed.get("batch_size"),
            score=percents[0],
            standard_error=percents[1],
            digits=score.get("correct") or "",
        )

    @property
    def num_scored(self) -> int:
        """Problems behind the score."""
        return int(self.number("num_problems", "score") or 0)

    def number(self, key: str, *parts: str) -> float | None:
        """Read a number of the summary's speed, or else of its score; `parts` set another order."""
        values = (self.summary[part].get(key) for part in parts or ("speed", "score"))
        return next((float(value) for value in values if isinstance(value, int | float)), None)

    def setting(self, key: str) -> Any:
        """Read a label of the experiment, or else a field of the policy or of the options."""
        values = (self.summary[part].get(key) for part in ("labels", "policy", "options"))
        return next((value for value in values if value is not None), None)

    @cached_property
    def problem_ids(self) -> tuple[str, ...] | None:
        """Ids of the scored problems in order, None if the file of problems is not kept."""
        lines = read_lines(self.folder / "problems.jsonl", ("index", "id"))
        found = {line["index"]: str(line["id"]) for line in lines}
        places = range(len(self.digits))
        return tuple(found[i] for i in places) if found and found.keys() >= {*places} else None

    @property
    def counts_tail(self) -> bool:
        """Whether its results give speeds with all decoded tokens counted, too."""
        parts = (self.summary["score"], self.summary["speed"])
        return all(part.get("with_tail") for part in parts if part)

    @property
    def decoded_per_answered(self) -> float | None:
        """Tokens that were decoded for each token of an answer."""
        for part in (self.summary["speed"], self.summary["score"]):
            if part.get("with_tail") and part.get("mean_tokens"):
                return float(part["with_tail"]["mean_tokens"] / part["mean_tokens"])
        return None

    def with_tail(self) -> Row:
        """Count all decoded tokens; what the results do not tell is missing."""
        answers = dict.fromkeys(("with_tail", "decode_tokens_per_second", *OF_TOKENS))
        counted = {
            part: known | answers | (known.get("with_tail") or {})
            for part in ("score", "speed")
            if (known := self.summary[part])
        }
        return Row.of(self.folder, {**self.summary, **counted})


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All rows of one model family on one test set, which stand in one table."""

    family: str
    test_set: str
    machine: str | None = None
    """Name of the machine, given where the same rows were measured on several."""
    rows: Sequence[Row]
    counts_tail: bool = False
    """Whether the tokens are all that were decoded, not those of answers alone."""

    @property
    def title(self) -> str:
        """Title for headings."""
        where = f" ({self.machine})" if self.machine else ""
        return f"{self.family} on {self.test_set}{where}{', tails counted' * self.counts_tail}"

    @property
    def task(self) -> str:
        """Name of the task in recipes."""
        return str(self.rows[0].summary.get("task", ""))

    def of(self, experiment: str) -> list[Row]:
        """Give the rows of an experiment, in the order of `METHODS`."""
        order = [*METHODS]
        return sorted(
            (row for row in self.rows if row.summary["experiment"] == experiment),
            key=lambda row: (
                order.index(row.method) if row.method in order else len(order),
                row.name,
            ),
        )

    def find(self, *methods: str, experiment: str = "methods") -> Row | None:
        """Find the row of the first of these methods that has one.

        What an experiment does not measure anew is taken from `methods`.
        """
        rows = [*self.of(experiment), *self.of("methods")]
        found = (row for method in methods for row in rows if row.method == method)
        return next(found, None)


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything found in the folders."""

    comparisons: Sequence[Comparison]
    warnings: Sequence[str] = field(default_factory=tuple)

    @property
    def rows(self) -> list[Row]:
        """The rows of all comparisons."""
        return [row for comparison in self.comparisons for row in comparison.rows]

    def with_tail(self) -> Results:
        """Count all decoded tokens, as the paper does for Dream."""
        warnings = [
            f"does not tell what was decoded behind answers; run its recipe again: {row.folder}"
            for row in self.rows
            if not row.counts_tail
        ]
        return Results(
            comparisons=[
                replace(c, counts_tail=True, rows=[row.with_tail() for row in c.rows])
                for c in self.comparisons
            ],
            warnings=(*self.warnings, *warnings),
        )


class Difference(NamedTuple):
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float
    num_pairs: int
    """Number of pairs that the difference rests on."""


def paired_difference(one: Row, other: Row) -> Difference | None:
    """Take the score of `other` from that of `one` on their common problems, in points.

    Rows may have answered different numbers of problems: the first ones count, if the files of
    problems show them to be the same. Without these files both need the same number. Where no
    answers differ, the interval is that of the rule of three: 3 / n to both sides. None where the
    problems of a row are not known or not the same.
    """
    count = min(len(one.digits), len(other.digits))
    if count < 2 or not _same_problems(one, other, count):
        return None
    gaps = [int(a) - int(b) for a, b in zip(one.digits[:count], other.digits[:count], strict=True)]
    mean, error = mean_and_error(gaps)
    reach = 1.96 * error if any(gaps) else 3 / count
    return Difference(100 * mean, 100 * (mean - reach), 100 * (mean + reach), count)


def _same_problems(one: Row, other: Row, count: int) -> bool:
    if one.problem_ids is not None and other.problem_ids is not None:
        return one.problem_ids[:count] == other.problem_ids[:count]
    return len(one.digits) == len(other.digits)
