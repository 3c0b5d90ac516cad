"""The result files of `d2f eval`, read back and sorted into what can be compared."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from d2f.errors import ConfigError, counted
from d2f.evaluation.metrics import OF_TOKENS
from d2f.problems.text2sql import TEXT_TO_SQL

FORMAT = 1
METHODS = (
    "autoregressive", "vanilla", "vanilla-eos-stop", "vanilla-512", "dllm-cache",
    "fast-dllm-parallel", "fast-dllm-prefix", "fast-dllm-dual", "undistilled", "serial",
    "pipelined", "control",
)  # fmt: skip
"""In the order of the paper's tables, autoregression first."""
MATHEMATICS = (
    "word-problems", "gsm8k", "gsm8k-variants", "gsm8k_cot", "minerva_math", "minerva_math500",
)  # fmt: skip
CODE = ("functions", "humaneval", "mbpp")
OTHERS = TEXT_TO_SQL
"""Benchmarks of kinds that the paper has none of."""
_NUMBER_LABELS = (
    "activate_threshold", "confidence_threshold", "add_threshold", "block_size", "batch_size",
    "num_steps",
)  # fmt: skip
_NAMES = ("row", "method", "experiment", "family", "test_set")


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
        """Of the row, and of its folder."""
        return str(self.summary["row"])

    @property
    def method(self) -> str:
        """One of `METHODS`, or one of the user's own."""
        return str(self.summary["method"])

    @property
    def label(self) -> str:
        """What tables call it; tells what was simulated."""
        label = str(self.summary.get("label") or self.method)
        return f"{label} (simulated)" if self.simulated else label

    @property
    def simulated(self) -> str | None:
        """What was not real, in words."""
        return self.summary.get("simulated") or None

    @property
    def environment(self) -> Mapping[str, Any]:
        """Where it was measured."""
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
        """The same without prompts."""
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
        """In percent."""
        found = self.number("score", "score")
        return None if found is None else 100 * found

    @property
    def standard_error(self) -> float | None:
        """Of the score, in points."""
        found = self.number("standard_error", "score")
        return None if found is None else 100 * found

    @property
    def num_scored(self) -> int:
        """Problems behind the score."""
        return int(self.number("num_problems", "score") or 0)

    def number(self, key: str, *parts: str) -> float | None:
        """A number of the summary's speed, or else of its score; `parts` set another order."""
        for part in parts or ("speed", "score"):
            value = (self.summary.get(part) or {}).get(key)
            if isinstance(value, int | float):
                return float(value)
        return None

    def setting(self, key: str) -> Any:
        """A label of the experiment, or else of the policy or the strategy's options."""
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
        """Its results tell speeds by all decoded tokens too, not by those of answers alone."""
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
        """The same, with all decoded tokens counted; what the results do not tell is missing."""
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
    """All rows of one family on one test set; what stands in one table."""

    family: str
    test_set: str
    machine: str | None = None
    """Given where the same rows were measured on several."""
    rows: Sequence[Row]
    counts_tail: bool = False
    """Its tokens are all that were decoded, not those of answers alone."""

    @property
    def title(self) -> str:
        """For headings."""
        where = f" ({self.machine})" if self.machine else ""
        return f"{self.family} on {self.test_set}{where}{', tails counted' * self.counts_tail}"

    @property
    def task(self) -> str:
        """As recipes name it."""
        return str(self.rows[0].summary.get("task", ""))

    def of(self, experiment: str) -> list[Row]:
        """Rows of an experiment, in the paper's order of methods."""
        found = [row for row in self.rows if row.summary["experiment"] == experiment]
        return sorted(found, key=_order)

    def find(self, *methods: str, experiment: str = "methods") -> Row | None:
        """The row of the first of these methods that there is.

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
        """Of all comparisons."""
        return [row for comparison in self.comparisons for row in comparison.rows]

    def with_tail(self) -> Results:
        """The same, with all decoded tokens counted, as the paper counts those of Dream.

        Example:
            `build_report(load_results([Path("results/dream")]).with_tail(), paper=True)`
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


def load_results(folders: Sequence[Path]) -> Results:
    """Read all finished rows below the folders.

    Raises:
        ConfigError: A folder is missing or has no finished row, or a summary is broken or of
            another format; names it.

    Example:
        `load_results([Path("results/word-problems")]).comparisons[0].of("methods")`
    """
    files: dict[Path, Path] = {}
    warnings: list[str] = []
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder; name what `d2f eval` wrote")
        found = sorted(folder.rglob("summary.json"))
        finished = {path.parent for path in found}
        started = [p.parent for p in sorted(folder.rglob("problems.jsonl"))]
        unfinished = [str(path) for path in started if path not in finished]
        if not found:
            begun = f"; not finished: {', '.join(unfinished)}" if unfinished else ""
            raise ConfigError(
                f"{folder} has no results (no summary.json in it or below it){begun}; "
                "make some with `d2f eval RECIPE`"
            )
        files |= {path.resolve(): path for path in found}
        warnings += [f"not finished and left out: {path}" for path in unfinished]
    rows, doubled = _drop_doubles([_read(path) for path in files.values()])
    warnings += doubled + [text for row in rows for text in _not_measured_yet(row)]
    return Results(comparisons=_compare(rows), warnings=tuple(dict.fromkeys(warnings)))


def _read(path: Path) -> Row:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(summary, dict) or "format" not in summary:
        raise ConfigError(f"{path} is no summary of `d2f eval`: it has no format")
    if summary["format"] != FORMAT:
        raise ConfigError(
            f"{path} has format {summary['format']!r}, and this d2f reads {FORMAT}; "
            "report with the d2f that wrote it, or run the recipe again"
        )
    wrong = _what_is_wrong(summary)
    if wrong:
        raise ConfigError(f"{path} is broken: {wrong}; run its recipe again")
    return Row(folder=path.parent, summary=summary)


def _what_is_wrong(summary: Mapping[str, Any]) -> str | None:
    """The first thing that the report could not work with."""
    for key in _NAMES:
        if not isinstance(summary.get(key), str):
            return f"'{key}' is no text"
    for key in ("labels", "policy", "options", "environment", "recipe", "model", "grid"):
        if not isinstance(summary.get(key), dict | None):
            return f"'{key}' is no table"
    for key in _NUMBER_LABELS:
        if not _is_number_or_none((summary.get("labels") or {}).get(key)):
            return f"labels.{key} is no number"
    for part in ("score", "speed"):
        if not isinstance(summary.get(part), dict | None):
            return f"'{part}' is no table"
    score, speed = summary.get("score"), summary.get("speed")
    for part in filter(None, (score, speed)):
        if not isinstance(part.get("with_tail"), dict | None):
            return "with_tail is no table"
        if not all(map(_is_number_or_none, map((part.get("with_tail") or {}).get, OF_TOKENS[1:]))):
            return "with_tail has what is no number"
    if score is not None:
        if not isinstance(score.get("num_problems"), int):
            return "score.num_problems is no whole number"
        for key in ("score", "standard_error"):
            if not _is_number_or_none(score.get(key)):
                return f"score.{key} is no number"
        digits = score.get("correct", "")
        if not isinstance(digits, str) or not set(digits) <= {"0", "1"}:
            return "score.correct is not made of the digits 0 and 1"
        if digits and len(digits) != score["num_problems"]:
            problems = counted(score["num_problems"], "problem")
            return f"score.correct has {counted(len(digits), 'digit')} for {problems}"
    if speed is not None:
        spreads = {
            key: speed.get(key)
            for key in ("tokens_per_second", "seconds_per_problem", "decode_tokens_per_second")
        }
        spreads["with_tail.tokens_per_second"] = (speed.get("with_tail") or {}).get(
            "tokens_per_second"
        )
        for key, spread in spreads.items():
            if spread is None:
                continue
            ends = spread if isinstance(spread, dict) else {}
            known = ends.keys() >= set(Spread._fields)
            if not known or not all(_is_number_or_none(ends[end]) for end in Spread._fields):
                return f"speed.{key} has no median, lowest and highest"
    return None


def _is_number_or_none(value: object) -> bool:
    """None is what result files have for nan."""
    return value is None or (isinstance(value, int | float) and math.isfinite(value))


def _drop_doubles(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Keep the newest of rows that were measured twice on one machine."""
    kept: dict[tuple[str, ...], Row] = {}
    warnings = []
    for row in rows:
        key = (*(str(row.summary[name]) for name in _NAMES), row.machine)
        other = kept.get(key)
        if other is not None:
            old, row = sorted((other, row), key=lambda r: str(r.environment.get("time", "")))
            warnings.append(f"measured twice, the newer is shown: {old.folder}, {row.folder}")
        kept[key] = row
    return list(kept.values()), warnings


def _not_measured_yet(row: Row) -> list[str]:
    """Parts that the recipe wants of the row and the summary lacks."""
    recipe = row.summary.get("recipe") or {}
    rows = [entry for entry in recipe.get("rows") or () if isinstance(entry, dict)]
    settings = next((entry for entry in rows if entry.get("name") == row.name), {})
    return [
        f"not finished, has no {part} yet: {row.folder}"
        for part in ("score", "speed")
        if recipe.get(part) is not None
        and settings.get(part, True)
        and row.summary.get(part) is None
    ]


def _compare(rows: Sequence[Row]) -> list[Comparison]:
    """Families and test sets; each machine by itself where it repeats what another measured."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.summary["family"], row.summary["test_set"]), []).append(row)
    comparisons = []
    for (family, test_set), members in sorted(groups.items()):
        times = Counter((row.summary["experiment"], row.name) for row in members)
        machines: list[str | None] = [None]
        if max(times.values()) > 1:
            machines = [*sorted({row.machine for row in members})]
        comparisons += [
            Comparison(
                family=family,
                test_set=test_set,
                machine=machine,
                rows=[row for row in members if machine in (None, row.machine)],
            )
            for machine in machines
        ]
    return comparisons


def _order(row: Row) -> tuple[int, str]:
    place = METHODS.index(row.method) if row.method in METHODS else len(METHODS)
    return place, row.name
