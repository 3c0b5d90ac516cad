"""`d2f bench train`: time, operations and memory of a step of the distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2f.cli.bench_options import DeviceOption, DtypeOption, JsonOption, Source, numbers
from d2f.cli.console import check_writable, out, plain_table, shown
from d2f.cli.decoding_options import with_option_groups
from d2f.cli.usage import UsageError, usage
from d2f.errors import counted
from d2f.evaluation.results import write_json

if TYPE_CHECKING:
    from d2f.cli.bench_train_setup import TrainSetup


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Source):
    """The options of `d2f bench train` that all measured rows share."""

    length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence. Default: 1024; shipped: 272.", min=8)
    ] = None
    lora: Annotated[
        int | None, typer.Option(help="Rank of the adapter. Default: 32; shipped: --full.", min=1)
    ] = None
    full: Annotated[bool, typer.Option("--full", help="Train all weights.")] = False
    dropout: Annotated[
        float, typer.Option(help="Of the adapter; the recipes have 0.1.", min=0, max=1)
    ] = 0.0
    sharding: Annotated[str, typer.Option(help="On several processes: none or full.")] = "none"
    loss_memory: Annotated[
        int | None, typer.Option(help="loss_memory_mib of the recipe, in MiB.", min=1)
    ] = None
    lr: Annotated[float, typer.Option(help="Learning rate.", min=0)] = 1e-4
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="On a GPU.")] = True


@with_option_groups
def train_command(
    *,
    options: TrainOptions,
    micro_batch: Annotated[
        str | None,
        typer.Option(help="Sequences in memory at once, as 1,4; max: what fits, to 32 (GPU)."),
    ] = None,
    checkpointing: Annotated[
        str, typer.Option(help="Activations are recomputed: no, yes or both.")
    ] = "no",
    steps: Annotated[int, typer.Option(help="Measured steps.", min=1)] = 10,
    repeat_batch: Annotated[
        int, typer.Option(help="Also train this many steps on one batch; 0: not.", min=0)
    ] = 0,
    memory_limit: Annotated[
        float | None, typer.Option(help="Most GiB of the GPU, as if it were smaller.", min=1)
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_file: JsonOption = None,
) -> None:
    """Measure training steps: time, tokens per second, FLOPs utilisation, memory, and the parts.

    Without --shape or --model: the shipped student, distilled from the shipped teacher as its
    recipe says, in small batches. Sequences are random tokens. torchrun measures several processes.

    Example:  d2f bench train --shape llada-8b --micro-batch 1,4 --checkpointing both
    """
    import torch

    from d2f.cli.bench_train_setup import TrainSetup, measure
    from d2f.cli.device import choose_device, choose_dtype, fastest_dtype
    from d2f.evaluation.rates import measure_rates
    from d2f.training.processes import Processes

    with Processes.current(None if device is None else choose_device(device)) as processes:
        if processes.device.index is not None and processes.device.type == "cuda":
            # Events and limits are those of the current device.
            torch.cuda.set_device(processes.device)
        if json_file is not None and processes.is_main:
            check_writable(json_file)
        if dtype is None:
            dtype = processes.from_main(fastest_dtype(processes.device.type))
        with usage():
            chosen = choose_dtype(dtype, processes.device.type)
            setup = TrainSetup.of(options, processes, chosen)
            setup.check()
        plan = _plan(setup, micro_batch, checkpointing, repeat_batch)
        if memory_limit is not None:
            _limit_memory(setup.device, memory_limit)

        def save(report: dict[str, Any]) -> None:
            if json_file is not None and processes.is_main:
                write_json(json_file, report | {"memory_limit_gib": memory_limit})

        rates = measure_rates(setup.device, setup.dtype)
        report = measure(setup, rates, plan, steps, repeat_batch, save)
        if processes.is_main:
            _print_report(report)
            if json_file is not None:
                out.print(f"Numbers written to {json_file}")


def _plan(
    setup: TrainSetup, micro_batch: str | None, checkpointing: str, repeat_batch: int
) -> list[tuple[int | None, bool]]:
    """Micro-batch sizes (None: what fits), each with and without checkpointing as asked."""
    chosen = {"no": [False], "yes": [True], "both": [False, True]}.get(checkpointing)
    if chosen is None:
        raise UsageError(f"--checkpointing {checkpointing!r}; it must be no, yes or both")
    sizes: list[int | None] = []
    for word in (micro_batch or ("8" if setup.options.shipped else "1,4")).split(","):
        sizes += [None] if word.strip() == "max" else numbers(word)
    if setup.processes.world_size > 1 and (None in sizes or repeat_batch):
        raise UsageError("--micro-batch max and --repeat-batch are for one process")
    if None in sizes and not setup.device.startswith("cuda"):
        raise UsageError("--micro-batch max is for a GPU; on a CPU, give numbers")
    return [(size, checkpoint) for checkpoint in chosen for size in sizes]


def _limit_memory(device: str, gib: float) -> None:
    import torch

    if not device.startswith("cuda"):
        raise UsageError("--memory-limit is for a GPU")
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(gib * 2**30 / total, 1.0))


def _print_report(report: dict[str, Any]) -> None:
    environment, model, settings = (report[n] for n in ("environment", "model", "settings"))
    kind = "random weights" if model["random_weights"] else "its own weights"
    trained = f"LoRA r={settings['lora']}" if settings["lora"] else "all weights"
    out.print(
        f"[bold]{model['name']}[/bold], {counted(model['num_layers'], 'layer')}, {kind}, "
        f"{trained}, length "
        f"{settings['length']}, {environment['dtype']}, on {settings['processes']} x "
        f"{environment['processor']}; a product of "
        f"{report['rates']['matmul_size']:,} x {report['rates']['matmul_size']:,} runs at "
        f"{report['rates']['matmul_flops_per_second'] / 1e12:,.1f} TFLOP/s\n"
    )
    out.print(_costs_table(report["rows"]))
    out.print()
    out.print(_phases_table(report["rows"]))
    for found in report["largest_micro_batch"]:
        how = "with" if found["checkpointing"] else "without"
        number = f"{found['micro_batch']}{' or more' * found['at_least']}"
        out.print(f"Largest micro-batch {how} checkpointing: [bold]{number}[/bold]")
    repeat = report["repeat"]
    if repeat:
        steps = ", ".join(f"{loss:.4g} at {step}" for step, loss in repeat["loss_at"].items())
        out.print(
            f"One batch again and again ({repeat['objective']}, lr {repeat['lr']:g}): loss "
            f"{steps}; a student that says what its teacher says would have {repeat['floor']:.4g}"
        )
    out.print(
        "\nof matmul: model FLOPs (teacher forward, student forward and backward; frozen weights' "
        "gradients and recomputation not counted) / time / the product's rate; of peak: the "
        "maker's dense bf16 rate. Phases: steps of their own, which the time does not contain.",
        style="dim",
    )


def _costs_table(rows: list[dict[str, Any]]) -> Any:
    table = plain_table(numbers=[
        "micro-\nbatch", "recom-\nputes", "ms", "tokens\nper s", "TFLOP", "of\npeak", "of\nmatmul",
        "peak\nGiB", "loss\nGiB",
    ])  # fmt: skip
    for row in rows:
        start = str(row["micro_batch"]), "yes" if row["checkpointing"] else "no"
        if not row["fits"]:
            table.add_row(*start, "out of memory")
            continue
        share, peaks = row["utilisation"], (row["peak_bytes"], row["loss_peak_bytes"])
        table.add_row(
            *start,
            f"{row['milliseconds']:.1f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['flops']['total'] / 1e12:.4g}",
            shown(share["nominal"], ".1%"),
            f"{share['measured']:.1%}",
            *(shown(size and size / 2**30, ".2f") for size in peaks),
        )
    return table


def _phases_table(rows: list[dict[str, Any]]) -> Any:
    from d2f.training.trainer import PHASES

    table = plain_table(
        numbers=["micro-\nbatch", "recom-\nputes", *(f"{phase}\nms" for phase in PHASES)]
    )
    for row in rows:
        if row["fits"]:
            table.add_row(
                str(row["micro_batch"]),
                "yes" if row["checkpointing"] else "no",
                *(f"{row['phases_ms'][phase]:.1f}" for phase in PHASES),
            )
    return table
