"""The command line `d2f`: its commands, and the messages and exit codes of errors."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated, Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

from d2f import __version__
from d2f.cli.bench_race import race_command
from d2f.cli.bench_step import step_command
from d2f.cli.bench_train import train_command as bench_train_command
from d2f.cli.chat import chat_command
from d2f.cli.console import log, say
from d2f.cli.ctrl_c import CtrlC
from d2f.cli.demo import demo_command
from d2f.cli.eval import eval_command
from d2f.cli.generate import generate_command
from d2f.cli.import_gguf import import_command
from d2f.cli.inspect import inspect_command
from d2f.cli.recipes import recipes_app
from d2f.cli.report import report_command
from d2f.cli.serve import serve_command
from d2f.cli.train import train_command
from d2f.cli.usage import Command, PromptCommand, UsageError
from d2f.errors import D2FError, D2FWarning


class _Commands(TyperGroup):
    """The group of commands; it passes Ctrl-C on to `main`, which prints a message."""

    def invoke(self, ctx: Any) -> Any:
        """Run the named command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _Stopped(str(stop)) from stop


class _Stopped(BaseException):
    """Stands for Ctrl-C, because typer ends silently on `KeyboardInterrupt`."""


app = typer.Typer(
    name="d2f",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo_command,
    "chat": chat_command,
    "train": train_command,
    "serve": serve_command,
    "eval": eval_command,
    "inspect": inspect_command,
    "import": import_command,
    "report": report_command,
}
app.command("generate", cls=PromptCommand)(generate_command)
for _name, _command in _COMMANDS.items():
    app.command(_name, cls=Command)(_command)
bench = typer.Typer(
    no_args_is_help=True,
    help="Measure speed: of one step, of whole answers, of training. Example:  d2f bench race",
)
bench.command("step", cls=Command)(step_command)
bench.command("race", cls=Command)(race_command)
bench.command("train", cls=Command)(bench_train_command)
app.add_typer(bench, name="bench")
app.add_typer(recipes_app, name="recipes")


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
    """Print a `D2FWarning` as one line, and other warnings as Python does."""
    if not issubclass(category, D2FWarning):
        (file or sys.stderr).write(
            warnings.formatwarning(message, category, filename, lineno, line)
        )
        return
    log.print("[yellow]warning:[/yellow]", end=" ")
    log.print(" ".join(str(message).split()), markup=False, soft_wrap=True)


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 failed after one clear line, 2 wrong use of a command or an option, 130
    stopped with Ctrl-C.
    """
    ctrl_c = CtrlC()
    try:
        with ctrl_c, warnings.catch_warnings():
            warnings.filterwarnings("always", category=D2FWarning)
            warnings.showwarning = _show_warning
            app()
    except (KeyboardInterrupt, _Stopped) as stop:
        _end(str(stop) or "stopped", 130)
    except SystemExit as end:
        if ctrl_c.came and end.code == 130:
            # Ctrl-C came before the command began, so typer has ended without a message.
            _end("stopped", 130)
        raise
    except BrokenPipeError:
        # The reader of the output is gone, as in `d2f … | head`, so nothing is printed.
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        if ctrl_c.came:
            # A library whose import was interrupted may raise an error of another kind.
            _end("stopped", 130)
        expected = isinstance(error, D2FError | OSError)
        kind = "" if expected else f"{type(error).__name__}: "
        hint = "" if expected else " (d2f --debug … shows where)"
        message = " ".join(f"{kind}{error}{hint}".split())
        log.print("[red]error:[/red]", end=" ")
        _end(message, 2 if isinstance(error, UsageError) else 1)


def _end(message: str, code: int) -> NoReturn:
    """Print a last line and exit."""
    say(log, message, markup=False)
    sys.exit(code)
