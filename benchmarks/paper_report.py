"""A report of `d2f eval`'s results with the paper's numbers beside and its claims, one by one.

    python benchmarks/paper_report.py results/word-problems results/functions

It has the tables and figures of `d2f report`, the paper's tables 1 to 7 and figures 1, 2 and 5 with
its published numbers, batch sizes, how well speeds repeat, and a verdict on each claim.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from paper.document import build_report
from paper.figures import PANELS

from d2f.errors import D2FError
from d2f.evaluation.report.document import write_report
from d2f.evaluation.report.reading import load_results
from d2f.evaluation.results import check_writable


def main(arguments: list[str] | None = None) -> None:
    """Write the report, and print what became of each claim."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="+", help="folders that d2f eval wrote")
    parser.add_argument("--output", type=Path, help="default: paper_report in the first folder")
    parser.add_argument("--count-tail", action="store_true", help="count all decoded tokens")
    parser.add_argument("--no-figures", action="store_true", help="draw nothing")
    options = parser.parse_args(arguments)
    folder = options.output or options.results[0] / "paper_report"
    try:
        found = load_results(options.results)
        found = found.with_tail() if options.count_tail else found
        check_writable(folder)
        report = build_report(found)
        words = ["python", "benchmarks/paper_report.py", *map(str, options.results)]
        command = shlex.join([*words, *(["--count-tail"] if options.count_tail else [])])
        page = write_report(
            report, folder, figures=not options.no_figures, command=command, panels=PANELS
        )
    except D2FError as error:
        raise SystemExit(f"paper_report: {error}") from None
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for line in report.tables("claims")[0].lines:
        print(f"{line['verdict']}: {line['claim']} ({line['where']})")
    print(f"Report written to {page}")


if __name__ == "__main__":
    main()
