"""The rows of `d2f eval`'s result files, and which of them may be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from d2f.evaluation.metrics import OF_TOKENS, mean_and_error
from d2f.evaluation.results import METHODS


class Spread(NamedTuple):
    """A median of several runs, and the runs at both ends."""

    median: float
    lowest: float
    highest: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One finished row: a method on a test set.

    Example:
        `row.speed.median` tokens per second, `row.number("tokens_per_forward")`.
    """

    folder: Path
    summary: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the row, and of its folder."""
        return str(self.summary["row"])

    @property
    def method(self) -> str:
        """One of `METHODS`, or one of the user's own."""
        return str(self.summary["method"])

    @property
    def label(self) -> str:
        """Name of the row in tables, which says if something was simulated."""
        label = str(self.summary.get("label") or self.method)
        return f"{label} (simulated)" if self.simulated else label

    @property
    def simulated(self) -> str | None:
        """Tells in words what was not real, as random weights; None if all was."""
        return self.summary.get("simulated") or None

    @property
    def environment(self) -> Mapping[str, Any]:
        """The machine, the versions and the commit of the measurement."""
        return self.summary.get("environment") or {}

    @property
    def machine(self) -> str:
        """The processor."""
        return str(self.environment.get("processor", "unknown machine"))

    @property
    def digits(self) -> str:
        """1 for each solved problem, 0 for the others, in order; empty without a score."""
        return str((self.summary.get("score") or {}).get("correct") or "")

    @cached_property
    def tokens_per_second(self) -> Spread | None:
        """Answer tokens / wall time, end to end."""
        return self._spread("tokens_per_second")

    @cached_property
    def seconds_per_problem(self) -> Spread | None:
        """Wall time of an answer."""
        return self._spread("seconds_per_problem")

    @cached_property
    def decode_tokens_per_second(self) -> Spread | None:
        """Tokens / time of the steps without a prompt."""
        return self._spread("decode_tokens_per_second")

    @property
    def room(self) -> tuple[Any, Any]:
        """Most tokens of an answer, and whether EOS ends it sooner; None where not told."""
        return self.summary.get("max_new_tokens"), self.summary.get("early_stop")

    @property
    def speed_batch_size(self) -> int | None:
        """Problems decoded together while the speed was measured."""
        return (self.summary.get("speed") or {}).get("batch_size")

    @property
    def score(self) -> float | None:
        """Share of right answers, in percent."""
        found = self.number("score", "score")
        return None if found is None else 100 * found

    @property
    def standard_error(self) -> float | None:
        """Standard error of the score, in points."""
        found = self.number("standard_error", "score")
        return None if found is None else 100 * found

    @property
    def num_scored(self) -> int:
        """Problems behind the score."""
        return int(self.number("num_problems", "score") or 0)

    def number(self, key: str, *parts: str) -> float | None:
        """Read a number of the summary's speed, or else of its score; `parts` set another order."""
        for part in parts or ("speed", "score"):
            value = (self.summary.get(part) or {}).get(key)
            if isinstance(value, int | float):
                return float(value)
        return None

    def setting(self, key: str) -> Any:
        """Read a label of the experiment, or else a field of the policy or of the options."""
        for part in ("labels", "policy", "options"):
            value = (self.summary.get(part) or {}).get(key)
            if value is not None:
                return value
        return None

    @cached_property
    def problem_ids(self) -> tuple[str, ...] | None:
        """Ids of the scored problems in order, None if the file of problems is not kept."""
        path = self.folder / "problems.jsonl"
        if not path.is_file():
            return None
        found: dict[int, str] = {}
        for line in path.read_bytes().splitlines():
            # A crash may have cut a line short; what it held was written again.
            with suppress(ValueError, KeyError, TypeError):
                problem = json.loads(line)
                found[int(problem["index"])] = str(problem["id"])
        count = len(self.digits)
        return tuple(found[i] for i in range(count)) if found.keys() >= set(range(count)) else None

    @property
    def counts_tail(self) -> bool:
        """Whether its results give speeds with all decoded tokens counted, too."""
        parts = [self.summary.get(part) for part in ("score", "speed")]
        return all(part.get("with_tail") for part in parts if part is not None)

    @property
    def decoded_per_answered(self) -> float | None:
        """Tokens that were decoded for each token of an answer."""
        for part in ("speed", "score"):
            known = self.summary.get(part) or {}
            if known.get("with_tail") and known.get("mean_tokens"):
                return float(known["with_tail"]["mean_tokens"] / known["mean_tokens"])
        return None

    def with_tail(self) -> Row:
        """Count all decoded tokens; what the results do not tell is missing."""
        summary = dict(self.summary)
        for part in ("score", "speed"):
            known = summary.get(part)
            if known is not None:
                counted = known.get("with_tail") or {}
                answers = ("with_tail", "decode_tokens_per_second", *OF_TOKENS)
                summary[part] = known | dict.fromkeys(answers) | counted
        return Row(folder=self.folder, summary=summary)

    def _spread(self, key: str) -> Spread | None:
        value = (self.summary.get("speed") or {}).get(key)
        if not isinstance(value, Mapping):
            return None
        ends = [value[end] for end in Spread._fields]
        return None if None in ends else Spread(*map(float, ends))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All rows of one model family on one test set, which stand in one table."""

    family: str
    test_set: str
    machine: str | None = None
    """Given where the same rows were measured on several."""
    rows: Sequence[Row]
    counts_tail: bool = False
    """Its tokens are all that were decoded, not those of answers alone."""

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
        found = [row for row in self.rows if row.summary["experiment"] == experiment]
        return sorted(found, key=_order)

    def find(self, *methods: str, experiment: str = "methods") -> Row | None:
        """Find the row of the first of these methods that has one.

        What an experiment does not measure anew is taken from `methods`.
        """
        for method in methods:
            for place in (experiment, "methods"):
                for row in self.of(place):
                    if row.method == method:
                        return row
        return None


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
        """Count all decoded tokens, as the paper does for Dream.

        Example:
            `build_report(load_results([Path("results/dream")]).with_tail())`
        """
        unknown = [str(row.folder) for row in self.rows if not row.counts_tail]
        warnings = [
            f"does not tell what was decoded behind answers; run its recipe again: {folder}"
            for folder in unknown
        ]
        return Results(
            comparisons=[
                replace(c, counts_tail=True, rows=[row.with_tail() for row in c.rows])
                for c in self.comparisons
            ],
            warnings=(*self.warnings, *warnings),
        )


def _order(row: Row) -> tuple[int, str]:
    order = list(METHODS)
    return order.index(row.method) if row.method in order else len(order), row.name


class Difference(NamedTuple):
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float
    num_pairs: int
    """How many pairs it rests on."""


def paired_difference(one: Row, other: Row) -> Difference | None:
    """Take the score of `other` from that of `one` on their common problems, in points.

    Rows may have answered different numbers of problems: the first ones count, if the files of
    problems show them to be the same. Without these files both need the same number. Where no
    answers differ, the interval is that of the rule of three: 3 / n to both sides. None where the
    problems of a row are not known or not the same.

    Example:
        `paired_difference(pipelined, vanilla).low` above -1: at most a point is lost.
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
