"""The report that sets the paper's tables, figures and claims beside the results of `d2f eval`."""

from __future__ import annotations

from collections.abc import Callable

from d2f.evaluation.report.document import Report
from d2f.evaluation.report.rows import Comparison, Results
from d2f.evaluation.report.table import Table

from . import ablations
from .aup import curve_table_with_areas
from .claims import CLAIMS_TITLE, claim_table
from .methods import tables_beside_paper
from .repeats import repeat_table

EXPERIMENTS = {
    "methods": "tables 1, 2, 5, 7",
    "thresholds": "table 3",
    "noise": "table 4",
    "control": "table 6",
    "steps": "figure 2",
    "block-size": "figure 5",
    "batch": "batch sizes",
}
"""Tables and figures of the paper that each experiment fills."""
_SECTIONS: dict[str, Callable[[Comparison], Table | None]] = {
    "Thresholds (table 3)": ablations.threshold_table,
    "Noise schedule (table 4)": ablations.noise_table,
    "The cache and parallelism (tables 5 and 7)": ablations.cache_table,
    "Fine-tuning alone (table 6)": ablations.control_table,
    "Score against cost (figure 2)": curve_table_with_areas,
    "Block size (figure 5)": ablations.block_size_table,
    "Batch size": ablations.batch_table,
    "How well speeds repeat": repeat_table,
}


def build_report(results: Results) -> Report:
    """Fill all tables whose rows are there, and go through the paper's claims.

    Example:
        `build_report(load_results([Path("results")])).tables("claims")`
    """
    comparisons = results.comparisons
    sections = [
        ("Methods (tables 1 and 2)", [t for c in comparisons for t in tables_beside_paper(c)])
    ]
    sections += [
        (heading, [table for c in comparisons if (table := make(c)) is not None])
        for heading, make in _SECTIONS.items()
    ]
    sections.append((CLAIMS_TITLE, [claim_table(comparisons)]))
    return Report(results=results, sections=sections, notes=missing_experiments(results))


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
