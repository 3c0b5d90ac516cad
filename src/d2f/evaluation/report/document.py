"""Put a report together: its tables, its figures, and how to repeat the measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2f.evaluation.report.curves import curve_table
from d2f.evaluation.report.figures import Panel, draw_figures
from d2f.evaluation.report.methods import method_tables, varied_table
from d2f.evaluation.report.rows import Comparison, Results
from d2f.evaluation.report.table import Table, commit
from d2f.evaluation.results import EXPERIMENTS, write_json, write_text

FILE = "README.md"
TABLES_FILE = "tables.json"
_VERSIONS = ("d2f", "python", "torch", "triton", "transformers", "lm_eval")
TAILS_COUNTED = """Tails are counted: tokens are all that were decoded but EOS, those behind the \
end of an answer too, as in the paper's tables of Dream. Speeds without prompts are left out."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The tables of a report, and the results that they are made of."""

    results: Results
    sections: Sequence[tuple[str, Sequence[Table]]]
    """A heading, and the tables below it; a section without a table is left out."""
    notes: Sequence[str] = ()
    """Paragraphs before the first section."""

    def tables(self, name: str | None = None) -> list[Table]:
        """Give all tables, or those of a name."""
        found = [table for _, tables in self.sections for table in tables]
        return [table for table in found if name in (None, table.name)]

    def to_dict(self) -> dict[str, Any]:
        """Give what a JSON file holds of the report."""
        return {
            "tables": [table.to_dict() for table in self.tables()],
            "warnings": list(self.results.warnings),
            "notes": list(self.notes),
        }


def build_report(results: Results) -> Report:
    """Fill all tables whose rows are there.

    Example:
        `build_report(load_results([Path("results")])).tables("methods")`
    """
    comparisons = results.comparisons
    varied = [varied_table(c, experiment) for c in comparisons for experiment in EXPERIMENTS[1:]]
    sections: dict[str, Sequence[Table | None]] = {
        "Methods": [table for c in comparisons for table in method_tables(c)],
        "Settings varied": varied,
        "Score against cost": [curve_table(c) for c in comparisons],
    }
    return Report(
        results=results,
        sections=[(name, list(filter(None, tables))) for name, tables in sections.items()],
    )


def write_report(
    report: Report,
    folder: Path,
    *,
    figures: bool,
    command: str,
    panels: Sequence[Panel] | None = None,
) -> Path:
    """Write README.md, the pictures, and tables.json with all numbers unrounded; return the page.

    `panels` are the pictures where they are not those of `d2f report`, and `command` is what was
    typed, for the page's end.

    Raises:
        ConfigError: There are figures to draw, and matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw_figures(report.results.comparisons, folder, panels) if figures else []
    write_json(folder / TABLES_FILE, report.to_dict())
    write_text(folder / FILE, markdown(report, drawn, command))
    return folder / FILE


def markdown(report: Report, drawn: Sequence[Panel], command: str) -> str:
    """Make the text of the page, with the pictures that were drawn."""
    results = report.results
    parts = [f"# Results: {_titles(results.comparisons)}"]
    parts += [f"**Warning:** {warning}" for warning in results.warnings]
    parts += report.notes
    if any(comparison.counts_tail for comparison in results.comparisons):
        parts.append(TAILS_COUNTED)
    for heading, tables in report.sections:
        parts += [f"## {heading}"] if tables else []
        for table in tables:
            parts += [] if table.title == heading else [f"### {table.title}"]
            parts += [table.markdown(), *table.notes]
    parts += ["## Figures"] if drawn else []
    parts += [f"![{panel.title}]({panel.name}.png)" for panel in drawn]
    parts += _footer(results, command)
    return "\n\n".join(parts) + "\n"


def _titles(comparisons: Sequence[Comparison]) -> str:
    """Name the families and test sets that have methods side by side; all where none has."""
    shown = [c for c in comparisons if c.of("methods")] or comparisons
    test_sets: dict[str, list[str]] = {}
    for comparison in shown:
        test_sets.setdefault(comparison.family, []).append(comparison.test_set)
    return "; ".join(
        f"{family} on {', '.join(dict.fromkeys(names))}" for family, names in test_sets.items()
    )


def _footer(results: Results, command: str) -> list[str]:
    """Tell where the numbers come from, and how to make them again."""
    places = []
    for row in results.rows:
        known = row.environment
        versions = ", ".join(f"{name} {known[name]}" for name in _VERSIONS if known.get(name))
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
