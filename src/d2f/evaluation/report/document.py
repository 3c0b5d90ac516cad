"""The whole report: tables, figures, claims, what was not found, and how to repeat it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2f.evaluation.report import ablations
from d2f.evaluation.report.claims import CLAIMS_TITLE, claim_table
from d2f.evaluation.report.curves import curve_table
from d2f.evaluation.report.figures import Drawing, draw_figures
from d2f.evaluation.report.methods import method_tables
from d2f.evaluation.report.repeats import repeat_table
from d2f.evaluation.report.results import Comparison, Results
from d2f.evaluation.report.table import Table, commit

FILE = "README.md"
TABLES_FILE = "tables.json"
EXPERIMENTS = {
    "methods": "tables 1, 2, 5, 7",
    "thresholds": "table 3",
    "noise": "table 4",
    "control": "table 6",
    "steps": "figure 2",
    "block-size": "figure 5",
    "batch": "batch sizes",
}
"""What each experiment fills."""


TAILS_COUNTED = """Tails are counted: tokens are all that were decoded but EOS, those behind the \
end of an answer too, as in the paper's tables of Dream. Speeds without prompts are left out."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is told of the results."""

    results: Results
    sections: Sequence[tuple[str, Sequence[Table]]]
    """A heading, and the tables below it."""

    def tables(self, name: str | None = None) -> list[Table]:
        """All, or those of a name."""
        found = [table for _, tables in self.sections for table in tables]
        return [table for table in found if name in (None, table.name)]

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "tables": [table.to_dict() for table in self.tables()],
            "warnings": list(self.results.warnings),
            "missing": missing_experiments(self.results),
        }


def build_report(results: Results, *, paper: bool) -> Report:
    """Fill all tables whose rows are there.

    Args:
        results: What `load_results` found.
        paper: Set the paper's numbers beside, and go through its claims.

    Example:
        `build_report(load_results([Path("results")]), paper=True).tables("methods")`
    """
    one: dict[str, Callable[[Comparison], Table | None]] = {
        "Thresholds (table 3)": lambda c: ablations.threshold_table(c, paper=paper),
        "Noise schedule (table 4)": lambda c: ablations.noise_table(c, paper=paper),
        "The cache and parallelism (tables 5 and 7)": lambda c: ablations.cache_table(
            c, paper=paper
        ),
        "Fine-tuning alone (table 6)": lambda c: ablations.control_table(c, paper=paper),
        "Score against cost (figure 2)": curve_table,
        "Block size (figure 5)": ablations.block_size_table,
        "Batch size": ablations.batch_table,
        "How well speeds repeat": repeat_table,
    }
    comparisons = results.comparisons
    sections = [
        (
            "Methods (tables 1 and 2)",
            [t for c in comparisons for t in method_tables(c, paper=paper)],
        )
    ]
    sections += [
        (heading, [table for c in comparisons if (table := make(c)) is not None])
        for heading, make in one.items()
    ]
    if paper:
        sections.append((CLAIMS_TITLE, [claim_table(comparisons)]))
    return Report(results=results, sections=[(h, tables) for h, tables in sections if tables])


def write_report(report: Report, folder: Path, *, paper: bool, figures: bool, command: str) -> Path:
    """Write README.md, the pictures, and tables.json with all numbers unrounded.

    Args:
        report: What `build_report` made.
        folder: Made where it is missing.
        paper: Draw the paper's points too.
        figures: Draw at all.
        command: What was typed, for the page's end.

    Returns:
        The page.

    Raises:
        ConfigError: There are figures to draw, and no matplotlib.

    Example:
        `write_report(report, Path("report"), paper=True, figures=True, command="d2f report r")`
    """
    folder.mkdir(parents=True, exist_ok=True)
    comparisons = report.results.comparisons
    drawings = draw_figures(comparisons, folder, paper=paper) if figures else []
    _write(folder / TABLES_FILE, json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")
    _write(folder / FILE, markdown(report, drawings, command))
    return folder / FILE


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def markdown(report: Report, drawings: Sequence[Drawing], command: str) -> str:
    """The page as text."""
    results = report.results
    parts = [f"# Results: {_titles(results.comparisons)}"]
    parts += [f"**Warning:** {warning}" for warning in results.warnings]
    parts += missing_experiments(results)
    if any(comparison.counts_tail for comparison in results.comparisons):
        parts.append(TAILS_COUNTED)
    for heading, tables in report.sections:
        parts.append(f"## {heading}")
        for table in tables:
            parts += [] if table.title == heading else [f"### {table.title}"]
            parts += [table.markdown(), *table.notes]
    if drawings:
        parts.append("## Figures")
        parts += [f"![{drawing.title}]({drawing.file})" for drawing in drawings]
    parts += _footer(results, command)
    return "\n\n".join(parts) + "\n"


def missing_experiments(results: Results) -> list[str]:
    """A line for each family and test set that has methods side by side and lacks ablations.

    An ablation of the same family and task counts, whatever its test set is called.
    """
    lines = []
    for comparison in results.comparisons:
        kin = [
            other
            for other in results.comparisons
            if (other.family, other.task) == (comparison.family, comparison.task)
        ]
        missing = [name for name in EXPERIMENTS if not any(other.of(name) for other in kin)]
        if comparison.of("methods") and missing:
            parts = ", ".join(f"{name} ({EXPERIMENTS[name]})" for name in missing)
            lines.append(f"Not measured of {comparison.title}: {parts}.")
    return lines


def _titles(comparisons: Sequence[Comparison]) -> str:
    """Families and test sets that have methods side by side; all where none has."""
    shown = [c for c in comparisons if c.of("methods")] or comparisons
    test_sets: dict[str, list[str]] = {}
    for comparison in shown:
        test_sets.setdefault(comparison.family, []).append(comparison.test_set)
    return "; ".join(
        f"{family} on {', '.join(dict.fromkeys(names))}" for family, names in test_sets.items()
    )


def _footer(results: Results, command: str) -> list[str]:
    """Where the numbers come from, and how to make them again."""
    places = []
    for row in results.rows:
        known = row.environment
        versions = ", ".join(
            f"{name} {known[name]}"
            for name in ("d2f", "python", "torch", "triton", "transformers", "lm_eval")
            if known.get(name)
        )
        date = str(known.get("time", ""))[:10]
        places.append(
            f"- {row.machine}, {known.get('dtype', 'unknown dtype')}; {versions}; "
            f"commit {commit(known)}; {date}"
        )
    recipes = sorted({str(row.summary.get("recipe_file") or "unknown") for row in results.rows})
    commands = [*(f"d2f eval {recipe}" for recipe in recipes), command]
    return [
        "## Where this was measured, and how to repeat it",
        "\n".join(dict.fromkeys(places)),
        "```\n" + "\n".join(commands) + "\n```",
        f"Each row's `summary.json` holds its whole recipe. `{TABLES_FILE}` holds the numbers of "
        "all tables, unrounded.",
    ]
