"""The options of `d2f generate` for a file of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2f.cli.usage import UsageError, usage

if TYPE_CHECKING:
    from d2f.cli.prompt_file import PromptFile

InputOption = Annotated[
    Path | None,
    typer.Option(
        "--input",
        help="A file of prompts (.jsonl, .json, .parquet); needs --output.",
        metavar="FILE",
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", help="--input: where a line for each answer goes.", metavar="FILE"),
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        help="--input: what a column holds, as prompt=question, messages=conversations or any "
        "other name in data.columns of a training recipe; repeatable.",
        metavar="WHAT=NAME",
    ),
]
CountOption = Annotated[int | None, typer.Option("--n", help="--input: answers of a row.", min=1)]
BatchOption = Annotated[
    int | None,
    typer.Option(help="--input: answers at a time. Default: 16, on a GPU 128.", min=1),
]
FreshOption = Annotated[
    bool, typer.Option("--fresh", help="--input: throw away what an earlier run has answered.")
]
ANSWER_COLUMNS = (
    "messages", "row", "sample", "seed", "num_tokens", "num_forwards", "finish_reason",
)  # fmt: skip
"""Columns of an answer's line beside its text, whose column must have another name."""


@dataclass(frozen=True, kw_only=True)
class Bulk:
    """A file of prompts to answer, and the file for the answers."""

    source: PromptFile
    output: Path
    num_samples: int
    batch_size: int | None
    fresh: bool
    as_json: bool


def read_bulk(
    prompt: str | None,
    source: Path | None,
    output: Path | None,
    *,
    columns: Sequence[str] | None,
    num_samples: int | None,
    batch_size: int | None,
    fresh: bool,
    stream: bool,
    as_json: bool,
) -> Bulk | None:
    """Return the options for a file of prompts; None if one prompt is given."""
    if source is None:
        if prompt is None:
            raise typer.BadParameter("there is nothing to answer; give a PROMPT, or --input FILE")
        alone = {"--output": output, "--column": columns, "--n": num_samples}
        for option, value in (alone | {"--batch-size": batch_size, "--fresh": fresh}).items():
            if value:
                raise UsageError(f"{option}: without effect without --input")
        return None
    if prompt is not None:
        raise UsageError("a PROMPT and --input exclude each other")
    if output is None:
        raise UsageError("--input needs --output, the file for the answers")
    if stream:
        raise UsageError("--stream: without effect with --input")
    if str(output) == "-":
        raise UsageError("--output -: answers go to a file, so that a run can go on; name one")
    if output.resolve() == source.resolve() or _is_link_to(output, source):
        raise UsageError(f"--output {output} is the file with the prompts; name another")
    return Bulk(
        source=_read_source(source, columns or ()),
        output=output,
        num_samples=num_samples or 1,
        batch_size=batch_size,
        fresh=fresh,
        as_json=as_json,
    )


def _is_link_to(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _read_source(path: Path, words: Sequence[str]) -> PromptFile:
    # Imported here: these modules import torch, and `d2f --help` must start fast.
    from d2f.cli.prompt_file import PromptFile
    from d2f.recipe import from_table
    from d2f.training.sections import ColumnConfig

    table = {}
    for word in words:
        what, equals, name = word.partition("=")
        if not equals or not what or not name:
            raise UsageError(f"--column {word!r}: write it as WHAT=NAME, prompt=question say")
        table[what] = name
    if table.get("response") in ANSWER_COLUMNS:
        raise UsageError(
            f"--column response={table['response']}: an answer's line has another column of this "
            f"name, as it has {', '.join(ANSWER_COLUMNS)}; name another"
        )
    with usage():
        return PromptFile(path=path, columns=from_table(ColumnConfig, table, "--column"))
