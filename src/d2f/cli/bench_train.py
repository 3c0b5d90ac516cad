"""`d2f bench train`: time, operations and memory of a step of the distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2f.cli.bench_options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    numbers,
)
from d2f.cli.bench_train_setup import TrainOptions
from d2f.cli.console import check_writable, log, out, plain_table, shown
from d2f.cli.decoding_options import with_option_groups
from d2f.cli.usage import UsageError, usage
from d2f.errors import ConfigError, counted
from d2f.evaluation.results import write_json

if TYPE_CHECKING:
    from d2f.cli.bench_train_setup import TrainSetup
    from d2f.cli.step_bench import StepBench
    from d2f.evaluation.rates import Rates

_REPORTED = (1, 10, 50, 100)
"""Steps on the repeated batch whose loss is shown, and the last."""

_MOST_TRIED = 32
"""Largest size that `--micro-batch max` tries: each try compiles, and smaller ones fill a GPU."""


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
            setup = options.setup(processes, chosen)
            setup.check()
        plan = _plan(setup, micro_batch, checkpointing, repeat_batch)
        if memory_limit is not None:
            _limit_memory(setup.device, memory_limit)
        rates = measure_rates(setup.device, setup.dtype)

        def save(report: dict[str, Any]) -> None:
            if json_file is not None and processes.is_main:
                write_json(json_file, report | {"memory_limit_gib": memory_limit})

        report = _measure(setup, rates, plan, steps, repeat_batch, save)
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
    for word in (micro_batch or setup.default_micro_batch).split(","):
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


def _measure(
    setup: TrainSetup,
    rates: Rates,
    plan: list[tuple[int | None, bool]],
    steps: int,
    repeat_batch: int,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """All rows, and the run on one batch; what there is is saved after each row."""
    from d2f.evaluation.environment import describe_environment

    report: dict[str, Any] = {
        "environment": describe_environment(device=setup.device, dtype=setup.dtype),
        "model": {},
        "settings": setup.to_dict(),
        "rates": rates.to_dict(),
        "rows": [],
        "largest_micro_batch": [],
        "repeat": {} if repeat_batch else None,
    }
    for number, (size, checkpointing) in enumerate(plan, 1):
        if size is None:
            size = _largest(setup, checkpointing)
            report["largest_micro_batch"].append(
                {
                    "micro_batch": size,
                    "checkpointing": checkpointing,
                    "at_least": size == _MOST_TRIED,
                }
            )
        if size > 0:
            _say(setup, f"micro-batch {size}{', recomputing' * checkpointing} …")
            report["rows"].append(
                _row(setup, rates, (size, checkpointing), steps, repeat_batch, report)
            )
        save(report | {"complete": number == len(plan)})
    if not report["model"]:
        raise ConfigError("not even the model fits into the memory; cut it by --layers")
    return report


def _row(
    setup: TrainSetup,
    rates: Rates,
    how: tuple[int, bool],
    steps: int,
    repeat_batch: int,
    report: dict[str, Any],
) -> dict[str, Any]:
    """One setting, measured; the first also says what the model is and repeats a batch."""
    from d2f.cli.step_bench import survives

    row: dict[str, Any] = {"micro_batch": how[0], "checkpointing": how[1]}

    def run() -> None:
        with setup.bench(*how) as bench:
            report["model"] = setup.describe(bench.trainer.student)
            if report["repeat"] == {}:
                # First, as it is about fresh weights; what it leaves is as fast.
                report["repeat"] = row | _repeat(setup, bench, repeat_batch)
            row.update(_costs(setup, bench, rates, steps))

    if setup.processes.world_size == 1:
        row["fits"] = survives(run)
    else:
        # All would have to agree that one lacks memory; here they end with its error.
        run()
        row["fits"] = True
    return row


def _say(setup: TrainSetup, text: str) -> None:
    if setup.processes.is_main:
        log.print(text, style="dim")


def _largest(setup: TrainSetup, checkpointing: bool) -> int:
    """Largest micro-batch of which two steps run."""
    from d2f.cli.step_bench import largest, survives

    def fits(size: int) -> bool:
        def run() -> None:
            with setup.bench(size, checkpointing) as bench:
                bench.time(1, num_warm_up=1)

        found = survives(run)
        _say(setup, f"micro-batch {size} {'fits' if found else 'does not fit'}")
        return found

    return largest(fits, first=4, most=_MOST_TRIED)


def _costs(setup: TrainSetup, bench: StepBench, rates: Rates, steps: int) -> dict[str, Any]:
    from d2f.evaluation.environment import describe_environment
    from d2f.evaluation.rates import nominal_bf16_rate

    processes = setup.processes
    bench.peak_memory()
    times = bench.time(steps)
    peaks = processes.share(bench.peak_memory())
    mean = max(processes.share(times.mean))
    flops, dense = bench.flops(), bench.flops(only_visible=False)
    processor = describe_environment(device=setup.device, dtype=setup.dtype)["processor"]
    nominal = nominal_bf16_rate(processor) if setup.dtype == "bfloat16" else None
    tokens = bench.config.batch_size * bench.config.data.sequence_length
    return {
        "seconds": asdict(times),
        "milliseconds": 1000 * mean,
        "tokens_per_second": tokens / mean,
        "flops": flops.to_dict(),
        "flops_all_pairs": dense.total,
        "nominal_flops_per_second": nominal,
        "utilisation": {
            "nominal": flops.total / mean / nominal if nominal else None,
            "nominal_all_pairs": dense.total / mean / nominal if nominal else None,
            "measured": flops.total / mean / rates.matmul_flops_per_second,
        },
        "phases_ms": bench.phases(max(steps // 2, 1)),
        "loss_in_student": not bench.trainer.loss.selects,
        "peak_bytes": max((peak for peak in peaks if peak is not None), default=None),
        "peak_bytes_of_each": peaks,
        "loss_peak_bytes": bench.loss_memory(),
        "num_counted": bench.num_counted,
    }


def _repeat(setup: TrainSetup, bench: StepBench, num_steps: int) -> dict[str, Any]:
    """Train on one batch, and hold the loss against the least that there is."""
    losses = bench.repeat(num_steps)
    shown = sorted({n for n in _REPORTED if n <= num_steps} | {num_steps})
    return {
        "num_steps": num_steps,
        "lr": setup.lr,
        "objective": setup.objective,
        "floor": bench.floor(),
        "loss_at": {str(n): losses[n - 1] for n in shown},
        "losses": losses,
    }


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
