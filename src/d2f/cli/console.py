"""Output of the commands: results go to stdout, progress and statistics to stderr."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from d2f.errors import ConfigError
from d2f.evaluation.results import write_json

if TYPE_CHECKING:
    from rich.table import Table

out = Console(highlight=False, soft_wrap=True)
log = Console(stderr=True, highlight=False)


def say(console: Console, *words: Any, **style: Any) -> None:
    """Print prose: a terminal gets lines broken between words, a file or pipe unbroken ones."""
    console.print(*words, soft_wrap=not console.is_terminal, **style)


def explain_blank(text: str) -> None:
    """Say on stderr that an answer has no text, since empty output looks like a failure."""
    if not text.strip():
        log.print("the answer ended without a text", style="dim")


def plain_table(gap: int = 1, *, names: Sequence[str] = (), numbers: Sequence[str] = ()) -> Table:
    """Make a table without lines: columns with words, then columns with numbers."""
    from rich.table import Table

    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim")
    for header in names:
        table.add_column(header, no_wrap=True)
    for header in numbers:
        table.add_column(header, justify="right", vertical="bottom", no_wrap=True)
    return table


def shown(value: float | None, form: str) -> str:
    """Write a number for a table, which shows a dash where there is none."""
    return "–" if value is None else format(value, form)


def write_numbers(path: Path | None, report: Any) -> None:
    """Write the report of a measurement to a JSON file, if one is wanted, and say so."""
    if path is not None:
        write_json(path, report)
        out.print(f"Numbers written to {path}")


def check_writable(*paths: Path | None) -> None:
    """Refuse files that cannot be written, before the work whose result goes there."""
    for path in filter(None, paths):
        part = path.with_name(path.name + ".part")
        try:
            part.touch()
            part.unlink()
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None
