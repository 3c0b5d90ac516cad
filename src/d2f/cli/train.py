"""`d2f train`: run a recipe of one of the three stages, or say what the run will need."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2f.cli.console import out, plain_table
from d2f.cli.usage import UsageError, check_command, load_with
from d2f.errors import CheckpointError, counted, unknown_name

if TYPE_CHECKING:
    from d2f.models.spec import ModelSpec
    from d2f.training.config import TrainConfig
    from d2f.training.run import TrainingSummary


# Memory in GiB that a process finds there, which is not the number of GB it is sold by; and dense
# products in fp32, in FLOP/s as the maker says.
_GPUS: dict[str, tuple[float, float]] = {
    "H200": (139.7, 67e12),
    "H100": (79.1, 67e12),
    "A100-80GB": (79.1, 19.5e12),
    "A100-40GB": (39.4, 19.5e12),
    "L40S": (44.4, 91.6e12),
    "RTX-4090": (23.6, 82.6e12),
}
# Their config.json is that of a shape known here.
_PRESETS = {
    "GSAI-ML/LLaDA-8B-Base": "llada-8b",
    "GSAI-ML/LLaDA-8B-Instruct": "llada-8b",
    "Dream-org/Dream-v0-Base-7B": "dream-7b",
    "Dream-org/Dream-v0-Instruct-7B": "dream-7b",
}


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
        facts = plan(config, gpu=gpu, share=peak_share, processes=processes)
        if as_json:
            out.print_json(json.dumps(facts))
        else:
            _print_plan(facts)
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
    if not summary.finished and not is_main:
        raise typer.Exit(130)
    if not summary.finished:
        raise KeyboardInterrupt(
            f"stopped at step {summary.steps}; saved in {summary.folder}; "
            "go on with the same command and --resume"
        )
    if not as_json and is_main:
        _print_summary(summary)


def _load(recipe: Path, overrides: list[str]) -> TrainConfig:
    from d2f.errors import ConfigError

    try:
        return load_with(_read, recipe, overrides)
    except ConfigError as error:
        # Of the processes on a machine, all of which read the same file, one says so.
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise typer.Exit(2 if isinstance(error, UsageError) else 1) from None
        raise


def _read(recipe: Path, overrides: Sequence[str]) -> TrainConfig:
    """Read a recipe; training itself does not know which tasks there are to evaluate on."""
    from d2f.evaluation.tasks import TASKS
    from d2f.recipe import one_of
    from d2f.training.config import load_recipe

    config = load_recipe(recipe, overrides)
    if config.evaluate is not None and config.evaluate.task is not None:
        one_of("evaluate.task", config.evaluate.task, TASKS)
    return config


def _print_summary(summary: TrainingSummary) -> None:
    steps, best = counted(summary.steps, "step"), summary.best
    out.print(f"{summary.folder}  ({steps}, {summary.seconds:.0f} s)", markup=False)
    if best is not None:
        line = f"{best['folder']}  (best score, {best['score']:.1%} at step {best['step']})"
        out.print(line, markup=False)


def plan(
    config: TrainConfig, *, gpu: str | None, share: float, processes: int | None
) -> dict[str, Any]:
    """All that a dry run prints: for a GPU known by name, or for this machine's device."""
    from d2f.training.estimate import estimate, plan_data

    if processes is None:
        processes = int(os.environ.get("WORLD_SIZE") or 1)
    spec, source = _spec(config)
    device = _device(gpu, config)
    compiled = config.compile and device["name"] != "cpu"
    found = estimate(config, spec, processes=processes, compiled=compiled)
    data, seconds = plan_data(config, spec), None
    epochs = config.steps * config.batch_size / data.num_rows if data.num_rows else None
    if device["flops_per_second"] is not None:
        seconds = found.seconds(config.steps, device["flops_per_second"], share)
        seconds = min(seconds, config.max_seconds or seconds)
    return {
        "stage": config.stage,
        "model": {"name": spec.architecture.name, "source": source},
        "num_parameters": found.num_parameters,
        "num_trained_parameters": found.num_trained,
        "processes": processes,
        "sharding": config.sharding,
        "sequences_per_update": found.sequences_per_update,
        "tokens_per_update": found.tokens_per_update,
        "micro_batch_size": found.micro_batch,
        "micro_batches_per_process": found.accumulated,
        "updates": config.steps,
        "max_seconds": config.max_seconds,
        "data": {**asdict(data), "epochs": epochs},
        "activation_checkpointing": config.activation_checkpointing,
        "memory_per_gpu": found.memory.to_dict(),
        "memory_otherwise": found.other_memory.to_dict(),
        "flops_per_update": found.flops_per_update,
        "computed_flops_per_update": found.computed_per_update,
        "device": device,
        "share_of_peak": share,
        "seconds": seconds,
    }


def _spec(config: TrainConfig) -> tuple[ModelSpec, str]:
    """The model's sizes, and where they are from."""
    from d2f.models.presets import preset_spec
    from d2f.training.assemble import initial_spec

    init = config.model.init
    try:
        return initial_spec(config), "[model.config]" if init is None else "config.json"
    except CheckpointError as error:
        if init in _PRESETS:
            return preset_spec(_PRESETS[init]), f"shape '{_PRESETS[init]}' of d2f"
        raise CheckpointError(
            f"a dry run needs the model's config.json, and no more of it: {error}"
        ) from None


def _device(gpu: str | None, config: TrainConfig) -> dict[str, Any]:
    """Name, memory and peak rate of a GPU; or of this machine, where a CPU's rate is measured."""
    import torch

    from d2f.evaluation.rates import measure_rates, nominal_bf16_rate

    fast = "bfloat16" in (config.precision, config.model.dtype)
    precision = "bfloat16" if fast else "float32"
    if gpu is not None:
        if gpu not in _GPUS:
            raise UsageError(unknown_name("GPU", gpu, _GPUS))
        memory, fp32 = _GPUS[gpu]
        return {
            "name": gpu,
            "memory_bytes": round(memory * 2**30),
            "flops_per_second": nominal_bf16_rate(gpu) if fast else fp32,
            "rate": f"the maker's, {precision}",
        }
    nominal, kind, name, memory_bytes = None, "cpu", "cpu", None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        nominal = nominal_bf16_rate(properties.name) if fast else None
        kind, name, memory_bytes = "cuda", properties.name, properties.total_memory
    rate = nominal or measure_rates(kind, precision).matmul_flops_per_second
    return {
        "name": name,
        "memory_bytes": memory_bytes,
        "flops_per_second": rate,
        "rate": f"the maker's, {precision}" if nominal else "of a measured matrix product",
    }


def _print_plan(facts: dict[str, Any]) -> None:
    """Print the plan in lines."""
    data, device, processes = facts["data"], facts["device"], facts["processes"]
    accumulated = facts["micro_batches_per_process"]
    _say(
        f"{facts['stage']}: {facts['model']['name']} ({facts['model']['source']}), "
        f"{facts['num_parameters'] / 1e6:,.1f}M parameters, "
        f"{facts['num_trained_parameters'] / 1e6:,.2f}M trained"
    )
    _say(
        f"an update: {counted(facts['sequences_per_update'], 'sequence', ',')}, "
        f"{counted(facts['tokens_per_update'], 'token', ',')}; "
        f"{f'on each of {processes} processes ' if processes > 1 else ''}"
        f"{accumulated} micro-batch{'es' if accumulated > 1 else ''} of {facts['micro_batch_size']}"
    )
    updates = counted(facts["updates"], "update", ",")
    if facts["max_seconds"]:
        updates = f"at most {updates} within {_duration(facts['max_seconds'])}"
    if data["num_samples"] is None:
        _say(f"{updates}; epochs not known: {data['note']}")
    else:
        samples, rows = counted(data["num_samples"], "sample", ","), data["num_rows"]
        epochs = "epochs (not known before samples are packed)"
        if rows is not None:
            epochs = f"{data['epochs']:.2f} epochs"
        if rows not in (None, data["num_samples"]):
            samples += f" in {counted(rows, 'row', ',')}"
        _say(f"{updates}: {epochs} of {samples} ({data['note']})")
    _print_memory(facts)
    if facts["seconds"] is not None:
        rate, update = device["flops_per_second"], facts["computed_flops_per_update"]
        _say(
            f"\ntime: {_duration(facts['seconds'])} if {processes} x {device['name']} "
            f"reach {facts['share_of_peak']:.0%} of {rate / 1e12:,.4g} TFLOP/s each "
            f"({device['rate']}); {update / 1e12:,.4g} TFLOP an update. Evaluations, samples and "
            "checkpoints come on top"
        )


def _print_memory(facts: dict[str, Any]) -> None:
    one, other = facts["memory_per_gpu"], facts["memory_otherwise"]
    columns = [one, other] if not facts["activation_checkpointing"] else [other, one]
    table = plain_table(2)
    table.add_column("GiB per process")
    table.add_column("activation\ncheckpointing off", justify="right")
    table.add_column("on", justify="right", vertical="bottom")
    for name in one:
        table.add_row(name, *(f"{column[name] / 2**30:,.2f}" for column in columns))
    out.print()
    out.print(table)
    chosen = "on" if facts["activation_checkpointing"] else "off"
    room, told = facts["device"]["memory_bytes"], ""
    if room is not None:
        fits = "less" if one["total"] < room else "more"
        told = f"; that is {fits} than the {room / 2**30:,.1f} GiB of {facts['device']['name']}"
    _say(f"The recipe has it {chosen}{told}. Not counted: about 1 GiB of the libraries' own")


def _say(line: str) -> None:
    # Names of folders and tables may have brackets, which would be read as colours.
    out.print(line, markup=False, soft_wrap=not out.is_terminal)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
