"""The options of `d2f generate` for a file of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2f.cli.usage import UsageError, usage

if TYPE_CHECKING:
    from d2f.cli.prompt_file import PromptFile

ANSWER_COLUMNS = (
    "messages", "row", "sample", "seed", "num_tokens", "num_forwards", "finish_reason",
)  # fmt: skip
"""Columns of an answer's line beside its text, whose column must have another name."""


@dataclass(frozen=True, kw_only=True)
class BulkOptions:
    """A file of prompts to answer, the file for the answers, and how they are made."""

    input: Annotated[
        Path | None,
        typer.Option(
            help="A file of prompts (.jsonl, .json, .parquet); needs --output.", metavar="FILE"
        ),
    ] = None
    output: Annotated[
        Path | None,
        typer.Option(help="--input: where a line for each answer goes.", metavar="FILE"),
    ] = None
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="--input: what a column holds, as prompt=question, messages=conversations or any "
            "other name in data.columns of a training recipe; repeatable.",
            metavar="WHAT=NAME",
        ),
    ] = None
    n: Annotated[int | None, typer.Option(help="--input: answers of a row.", min=1)] = None
    batch_size: Annotated[
        int | None,
        typer.Option(help="--input: answers at a time. Default: 16, on a GPU 128.", min=1),
    ] = None
    fresh: Annotated[
        bool, typer.Option("--fresh", help="--input: throw away what an earlier run has answered.")
    ] = False

    def source(self, prompt: str | None, *, stream: bool) -> PromptFile | None:
        """Check the options and return the file of prompts; None if one prompt is given."""
        if self.input is None:
            if prompt is None:
                raise typer.BadParameter(
                    "there is nothing to answer; give a PROMPT, or --input FILE"
                )
            for field in fields(self):
                if getattr(self, field.name):
                    option = "--" + field.name.replace("_", "-")
                    raise UsageError(f"{option}: without effect without --input")
            return None
        if prompt is not None:
            raise UsageError("a PROMPT and --input exclude each other")
        output = self.output
        if output is None:
            raise UsageError("--input needs --output, the file for the answers")
        if stream:
            raise UsageError("--stream: without effect with --input")
        if str(output) == "-":
            raise UsageError("--output -: answers go to a file, so that a run can go on; name one")
        if output.resolve() == self.input.resolve() or _is_link_to(output, self.input):
            raise UsageError(f"--output {output} is the file with the prompts; name another")
        return _read_source(self.input, self.column or ())


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
