"""`d2f train`: run a recipe of one of the three stages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2f.cli.console import out
from d2f.cli.usage import UsageError, check_command, load_with
from d2f.errors import counted

if TYPE_CHECKING:
    from d2f.training.config import TrainConfig
    from d2f.training.run import TrainingSummary


def train_command(
    recipe: Annotated[Path, typer.Argument(help="A TOML file, or one of `d2f recipes`.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder to write to; the recipe names one.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in the output.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1; default: the GPU if there is one.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting, as optimizer.lr=1e-4."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what it will need; train nothing.")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option(help="Dry run: for this GPU, as H100; default: this machine.")
    ] = None,
    peak_share: Annotated[
        float, typer.Option(help="Dry run: share of the peak rate reached.", min=0.01, max=1.0)
    ] = 0.5,
    processes: Annotated[
        int | None, typer.Option(help="Dry run: processes, a GPU each.", min=1)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON to stdout.")
    ] = False,
) -> None:
    """Train a model: autoregressive, masked-diffusion or d2f (distillation).

    The model is written to OUTPUT/final, the log to OUTPUT/log.jsonl. Ctrl-C saves a checkpoint.

    Example:  d2f train recipes/tiny_cpu_autoregressive.toml --set steps=100
    """
    import json
    import os
    from dataclasses import asdict

    from d2f.cli.device import choose_device
    from d2f.cli.train_answers import make_evaluator, make_sampler
    from d2f.training.progress import Terminal
    from d2f.training.run import train
    from d2f.training.run_log import Reporter

    overrides = list(settings or [])
    if output is not None:
        overrides.append(f"output={json.dumps(str(output))}")
    if not dry_run and (gpu is not None or processes is not None):
        raise UsageError("--gpu and --processes are for a --dry-run")
    check_command(recipe, "train")
    config = _load(recipe, overrides)
    if dry_run:
        from d2f.cli.train_plan import show_plan

        show_plan(config, gpu=gpu, share=peak_share, processes=processes, as_json=as_json)
        return
    if device is not None:
        device = choose_device(device)
    # Of several processes one speaks.
    is_main = os.environ.get("RANK", "0") == "0"
    reporter = Terminal() if is_main else Reporter()
    try:
        summary = train(
            config,
            device=device,
            resume=resume,
            make_sampler=make_sampler,
            make_evaluator=make_evaluator,
            reporter=reporter,
        )
    finally:
        reporter.close()
    if as_json and is_main:
        out.print_json(json.dumps(asdict(summary)))
    if not summary.finished:
        if not is_main:
            raise typer.Exit(130)
        raise KeyboardInterrupt(
            f"stopped at step {summary.steps}; saved in {summary.folder}; "
            "go on with the same command and --resume"
        )
    if not as_json and is_main:
        _print_summary(summary)


def _load(recipe: Path, overrides: list[str]) -> TrainConfig:
    import os

    from d2f.errors import ConfigError
    from d2f.training.config import load_recipe

    try:
        return load_with(load_recipe, recipe, overrides)
    except ConfigError as error:
        # Of the processes on a machine, all of which read the same file, one says so.
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise typer.Exit(2 if isinstance(error, UsageError) else 1) from None
        raise


def _print_summary(summary: TrainingSummary) -> None:
    line = f"{summary.folder}  ({counted(summary.steps, 'step')}, {summary.seconds:.0f} s)"
    out.print(line, markup=False)
    if summary.best is not None:
        score, step = summary.best["score"], summary.best["step"]
        line = f"{summary.best['folder']}  (best score, {score:.1%} at step {step})"
        out.print(line, markup=False)
