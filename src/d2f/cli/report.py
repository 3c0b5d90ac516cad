"""`d2f report`: tables and plots from result files."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2f.cli.console import log, out, plain_table

if TYPE_CHECKING:
    from d2f.evaluation.report.table import Table

SHOWN = {
    "label": "",
    "tokens_per_second": "tokens\nper s",
    "over_autoregressive": "x auto-\nregress.",
    "over_vanilla": "x\nvanilla",
    "seconds_per_problem": "s per\nproblem",
    "mean_tokens": "mean\ntokens",
    "score_text": "score ± se, %\n(problems)",
}
"""Columns that fit a terminal, and what stands above them there."""


def report_command(
    results: Annotated[
        list[Path], typer.Argument(help="Folders that d2f eval wrote.", show_default=False)
    ],
    count_tail: Annotated[
        bool,
        typer.Option(
            "--count-tail",
            help="Count all decoded tokens, those behind an answer's end too, as the paper does "
            "for Dream.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="Where the report goes. Default: report in the first folder."),
    ] = None,
    no_figures: Annotated[
        bool, typer.Option("--no-figures", help="Draw nothing; needs no matplotlib.")
    ] = False,
) -> None:
    """Make Markdown and plots from the results of d2f eval.

    Methods side by side, what makes the ratios, settings varied, and score against cost.
    tables.json beside the page has all numbers unrounded.

    Example:  d2f report results/word-problems results/functions
    """
    from d2f.evaluation.plot import new_figure
    from d2f.evaluation.report.document import build_report, write_report
    from d2f.evaluation.report.reading import load_results
    from d2f.evaluation.results import check_writable

    folder = output or results[0] / "report"
    found = load_results(results)
    found = found.with_tail() if count_tail else found
    check_writable(folder)
    if not no_figures:
        new_figure(1, 1, without="--no-figures")
    report = build_report(found)
    options = ["--count-tail"] if count_tail else []
    command = shlex.join(["d2f", "report", *map(str, results), *options])
    page = write_report(report, folder, figures=not no_figures, command=command)
    for warning in found.warnings:
        log.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    for table in report.tables("methods"):
        _print_table(table)
    out.print(f"Report written to {page}")


def _print_table(table: Table) -> None:
    """Print a table in 80 characters; the slowest and fastest runs stand on the page alone."""
    from rich.markup import escape

    from d2f.evaluation.report.table import significant

    grid = plain_table()
    columns = [column for column in table.columns if column.key in SHOWN]
    for column in columns:
        # Where it gets narrow, names are broken and numbers are not.
        justify: Any = "right" if column.is_number else "left"
        grid.add_column(
            SHOWN[column.key],
            justify=justify,
            vertical="bottom",
            no_wrap=column.is_number,
            overflow="fold",
        )
    for line in table.lines:
        speed = line["tokens_per_second"]
        cells = [
            significant(speed.median) if column.key == "tokens_per_second" and speed
            else column.show(line)
            for column in columns
        ]  # fmt: skip
        grid.add_row(*map(escape, cells), style="bold" if line["method"] == "pipelined" else "")
    out.print(f"\n[bold]{escape(table.title)}[/bold]\n")
    out.print(grid)
    for note in table.notes:
        if "Warning" in note:
            out.print(note.replace("**", ""), style="yellow", markup=False)
    out.print()
