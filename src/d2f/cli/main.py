"""`d2f`: the commands, and how errors reach people."""

from __future__ import annotations

import sys
import traceback
import warnings
from typing import Annotated, TextIO

import typer

from d2f import __version__
from d2f.cli.bench import bench_app
from d2f.cli.chat import chat_command
from d2f.cli.console import log
from d2f.cli.demo import demo_command
from d2f.cli.eval import eval_command
from d2f.cli.generate import generate_command
from d2f.cli.inspect import inspect_command
from d2f.cli.report import report_command
from d2f.cli.serve import serve_command
from d2f.cli.train import train_command
from d2f.errors import D2FError, D2FWarning

app = typer.Typer(
    name="d2f",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command("demo")(demo_command)
app.command("generate")(generate_command)
app.command("chat")(chat_command)
app.command("train")(train_command)
app.command("serve")(serve_command)
app.command("eval")(eval_command)
app.command("inspect")(inspect_command)
app.add_typer(bench_app, name="bench")
app.command("report")(report_command)


@app.callback(invoke_without_command=True)
def common(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Discrete Diffusion Forcing: distil a diffusion language model, decode it in a pipeline.

    Start with:  d2f demo
    """
    if version:
        typer.echo(f"d2f {__version__}")
        raise typer.Exit


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning of ours as one line; others as Python writes them."""
    if not issubclass(category, D2FWarning):
        (file or sys.stderr).write(
            warnings.formatwarning(message, category, filename, lineno, line)
        )
        return
    log.print("[yellow]warning:[/yellow]", end=" ")
    log.print(" ".join(str(message).split()), markup=False, soft_wrap=True)


def main() -> None:
    """Run the command line: exit code 0 done, 1 failed with one clear line, 2 usage."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("always", category=D2FWarning)
            warnings.showwarning = _show_warning
            app()
    except KeyboardInterrupt:
        log.print("stopped")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone, as `d2f … | head` does; nothing is left to say.
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        expected = isinstance(error, D2FError | OSError)
        kind = "" if expected else f"{type(error).__name__}: "
        hint = "" if expected else " (d2f --debug … shows where)"
        message = " ".join(f"{kind}{error}{hint}".split())
        log.print("[red]error:[/red]", end=" ")
        log.print(message, markup=False, soft_wrap=True)
        sys.exit(1)
