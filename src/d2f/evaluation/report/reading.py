"""Read the result files of `d2f eval` back, and say what is wrong with a file."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2f.errors import ConfigError, counted
from d2f.evaluation.metrics import OF_TOKENS
from d2f.evaluation.report.rows import Comparison, Results, Row, Spread

FORMAT = 1
_NUMBER_LABELS = (
    "activate_threshold", "confidence_threshold", "add_threshold", "block_size", "batch_size",
    "num_steps",
)  # fmt: skip
_TABLES = (
    "labels", "policy", "options", "environment", "recipe", "model", "grid", "score", "speed",
)  # fmt: skip
_SPREADS = ("tokens_per_second", "seconds_per_problem", "decode_tokens_per_second")
_NAMES = ("row", "method", "experiment", "family", "test_set")


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
    return Row.of(path.parent, summary | {key: summary.get(key) or {} for key in _TABLES})


def _what_is_wrong(summary: Mapping[str, Any]) -> str | None:
    """Name the first entry that the report could not work with; None if there is none."""
    for key in _NAMES:
        if not isinstance(summary.get(key), str):
            return f"'{key}' is no text"
    for key in _TABLES:
        if not isinstance(summary.get(key), dict | None):
            return f"'{key}' is no table"
    labels, score, speed = (summary.get(key) or {} for key in ("labels", "score", "speed"))
    numbers = {f"labels.{key}": labels.get(key) for key in _NUMBER_LABELS}
    numbers |= {f"score.{key}": score.get(key) for key in ("score", "standard_error")}
    spreads = {f"speed.{key}": speed.get(key) for key in _SPREADS}
    for name, part in (("score", score), ("speed", speed)):
        tail = part.get("with_tail") or {}
        if not isinstance(tail, dict):
            return f"{name}.with_tail is no table"
        numbers |= {f"{name}.with_tail.{key}": tail.get(key) for key in OF_TOKENS[1:]}
        if part is speed:
            spreads["speed.with_tail.tokens_per_second"] = tail.get("tokens_per_second")
    for name, value in numbers.items():
        if not _is_number_or_none(value):
            return f"{name} is no number"
    for name, spread in spreads.items():
        ends = spread if isinstance(spread, dict) else {}
        known = ends.keys() >= {*Spread._fields}
        if spread is not None and not (known and all(map(_is_number_or_none, ends.values()))):
            return f"{name} has no median, lowest and highest"
    return _what_is_wrong_of_score(score) if score else None


def _what_is_wrong_of_score(score: Mapping[str, Any]) -> str | None:
    count, digits = score.get("num_problems"), score.get("correct", "")
    if not isinstance(count, int):
        return "score.num_problems is no whole number"
    if not isinstance(digits, str) or not set(digits) <= {"0", "1"}:
        return "score.correct is not made of the digits 0 and 1"
    if digits and len(digits) != count:
        return f"score.correct has {counted(len(digits), 'digit')} for {counted(count, 'problem')}"
    return None


def _is_number_or_none(value: object) -> bool:
    """Tell whether a value is a number, or None, which result files have for nan."""
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
    """List the parts that the recipe wants of the row and the summary lacks."""
    recipe = row.summary["recipe"]
    rows = [entry for entry in recipe.get("rows") or () if isinstance(entry, dict)]
    settings = next((entry for entry in rows if entry.get("name") == row.name), {})
    return [
        f"not finished, has no {part} yet: {row.folder}"
        for part in ("score", "speed")
        if recipe.get(part) is not None and settings.get(part, True) and not row.summary[part]
    ]


def _compare(rows: Sequence[Row]) -> list[Comparison]:
    """Group rows by family and test set, and by machine where machines measured the same rows."""
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
