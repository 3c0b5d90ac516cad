"""The whole report: tables, figures, claims, what was not found, and how to repeat it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2f.evaluation.report import ablations
from d2f.evaluation.report.claims import CLAIMS_TITLE, claim_table
from d2f.evaluation.report.curves import curve_table
from d2f.evaluation.report.figures import Drawing, draw_figures
from d2f.evaluation.report.methods import method_tables
from d2f.evaluation.report.results import Comparison, Results
from d2f.evaluation.report.table import Table, commit

FILE = "README.md"
EXPERIMENTS = {
    "methods": "tables 1 and 2, 5 and 7, figure 1",
    "thresholds": "table 3, figure 2",
    "noise": "table 4",
    "control": "table 6",
    "steps": "figure 2, vanilla's curve",
    "block-size": "figure 5",
    "batch": "batch sizes",
}
"""What each experiment fills."""


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
    """Write README.md and the pictures.

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
    page = folder / FILE
    part = page.with_name(page.name + ".part")
    part.write_text(markdown(report, drawings, command), encoding="utf-8")
    part.replace(page)
    return page


def markdown(report: Report, drawings: Sequence[Drawing], command: str) -> str:
    """The page as text."""
    results = report.results
    titles = "; ".join(comparison.title for comparison in results.comparisons)
    parts = [f"# Results: {titles}"]
    parts += [f"**Warning:** {warning}" for warning in results.warnings]
    parts += missing_experiments(results)
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
    """A line for each family and test set that lacks experiments."""
    lines = []
    for comparison in results.comparisons:
        missing = [
            f"`{name}` ({fills})" for name, fills in EXPERIMENTS.items() if not comparison.of(name)
        ]
        if missing:
            lines.append(f"Not found for {comparison.title}: {', '.join(missing)}.")
    return lines


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
        "Each row's `summary.json` holds its whole recipe.",
    ]
