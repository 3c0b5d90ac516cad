"""`d2f bench`: the group of commands that measure speed."""

from __future__ import annotations

import typer

from d2f.cli.bench_race import race_command
from d2f.cli.bench_serve import serve_command
from d2f.cli.bench_step import step_command
from d2f.cli.bench_train import train_command
from d2f.cli.command import Command

bench_app = typer.Typer(
    no_args_is_help=True,
    help="Measure speed: of one step, of whole answers, of training, of a server. "
    "Example:  d2f bench race",
)
bench_app.command("step", cls=Command)(step_command)
bench_app.command("race", cls=Command)(race_command)
bench_app.command("train", cls=Command)(train_command)
bench_app.command("serve", cls=Command)(serve_command)
