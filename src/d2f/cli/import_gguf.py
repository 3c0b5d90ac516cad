"""`d2f import`: write the model in a GGUF file as a folder in the hub's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2f.cli.console import log, out, say
from d2f.cli.usage import usage
from d2f.errors import counted


def import_command(
    file: Annotated[Path, typer.Argument(help="GGUF file of the Llama or Qwen2 layout.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; it must be new or empty.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16. Default: the file's; of blocks float32."),
    ] = None,
) -> None:
    """Write the model in a GGUF file as a folder with safetensors, as the hub holds models.

    The folder has all that the file has: config, tokenizer, chat template, ends of an answer. Every
    program that reads models of the hub can use it. d2f itself reads GGUF files as they are, so
    that it needs no import.

    Example: d2f import model.Q4_K_M.gguf ./my-model --dtype bfloat16
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    from d2f.models.checkpoint import resolve_dtype
    from d2f.models.imported import import_gguf

    with usage():
        resolve_dtype(dtype)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    off = not log.is_terminal
    with Progress(*columns, console=log, transient=True, disable=off) as progress:
        task = progress.add_task("weights", total=None)
        about = import_gguf(
            file,
            folder,
            dtype=dtype,
            on_bytes=lambda done, total: progress.update(task, completed=done, total=total),
        )
    numbers = sum(blocks["numbers"] for blocks in about["blocks"].values())
    types = ", ".join(f"{b['numbers']:,} in {name}" for name, b in about["blocks"].items())
    say(
        log,
        f"{about['layout']}, {counted(numbers, 'parameter', ',')} ({types}), "
        f"written in {about['dtype']}",
        style="dim",
        markup=False,
    )
    if about["no_tokenizer"] is not None:
        say(log, f"the folder has no tokenizer: {about['no_tokenizer']}", markup=False)
    out.print(str(folder), markup=False)
