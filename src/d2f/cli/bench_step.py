"""`d2f bench step`: the cost of one decoding step."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2f.cli.bench_options import (
    JsonOption,
    Machine,
    PageSizeOption,
    Source,
    describe_model,
    numbers,
)
from d2f.cli.console import check_writable, log, out, plain_table, write_numbers
from d2f.cli.decoding_options import with_option_groups
from d2f.cli.usage import UsageError
from d2f.errors import counted

if TYPE_CHECKING:
    from d2f.evaluation.rates import Rates
    from d2f.evaluation.step import StepCost
    from d2f.models.transformer import Transformer

_COLUMNS = {
    "batch": "{batch_size}",
    "window": "{window}",
    "cached": "{kv_length}",
    "ms": "{milliseconds:.2f}",
    "GB\nread": "{gb:.2f}",
    "TFLOP": "{tflop:.2f}",
    "floor\nms": "{floor_ms:.2f}",
    "x\nfloor": "{ratio_to_floor:.2f}",
    "of\nmatmul": "{share_of_matmul_rate:.0%}",
    "query\nper s": "{query_tokens_per_second:.0f}",
}


@with_option_groups
def step_command(
    *,
    source: Source,
    batch: Annotated[str, typer.Option(help="Rows; several as 1,16.")] = "1",
    window: Annotated[
        str, typer.Option(help="Live query tokens of a row; several as 1,64.")
    ] = "64",
    kv_length: Annotated[
        str, typer.Option(help="Cached positions; several as 1024,16384.")
    ] = "1024",
    steps: Annotated[int, typer.Option(help="Measured runs of each step.", min=1)] = 30,
    engine_tokens: Annotated[
        int, typer.Option(help="Tokens of the engine's run that shows idle gaps; 0: none.", min=0)
    ] = 128,
    page_size: PageSizeOption = 16,
    machine: Machine,
    json_file: JsonOption = None,
) -> None:
    """Measure single decoding steps, and hold them against what the machine could do at best.

    Without --shape or --model: the shipped student. The autoregressive step of the same sizes and
    weights is measured beside.

    Example:  d2f bench step --shape llada-8b --batch 1,16 --window 1,64 --kv-length 1024,16384
    """
    sizes = [numbers(text) for text in (batch, window, kv_length)]
    check_writable(json_file)
    from d2f.evaluation.environment import describe_environment

    device, dtype = machine.chosen()
    loaded, name = source.load(device, dtype)
    causal = loaded.spec.architecture.causal
    if causal and window not in ("1", "64"):
        raise UsageError(f"--window {window}: an autoregressive model computes 1 token of a row")
    gaps = None
    if engine_tokens:
        # Measured first: its start-up time must include compiling the kernels.
        chosen = [sizes[0][0], max(sizes[1]), sizes[2][0]]
        gaps = engine_gaps(loaded, chosen, engine_tokens, page_size, machine.backend)
    rates, rows = measure_grid(loaded, sizes, steps, page_size, machine.backend, dtype)
    report = {
        "environment": describe_environment(device=device, dtype=dtype),
        "model": describe_model(loaded, name, random=source.shape is not None),
        "settings": {"page_size": page_size, "num_steps": steps},
        **summarize(rates, rows, gaps),
    }
    _print_report(report)
    write_numbers(json_file, report)


def measure_grid(
    model: Transformer,
    sizes: list[list[int]],
    steps: int,
    page_size: int,
    backend: str,
    dtype: str,
) -> tuple[Rates, list[StepCost]]:
    """Measure the machine's rates, and the cost of a step at each combination of sizes.

    `sizes` are batch sizes, windows, and numbers of cached positions. Of a diffusion model the
    autoregressive twin is measured too.
    """
    from d2f.engine.steady import SteadyStep
    from d2f.evaluation.rates import measure_rates
    from d2f.evaluation.step import measure_step
    from d2f.models.presets import autoregressive_twin

    rates = measure_rates(str(model.device), dtype)
    twin, (batches, windows, lengths) = autoregressive_twin(model), sizes
    wanted = [(twin, batch, 1, length) for length in lengths for batch in batches]
    if twin is not model:
        wanted += [(model, b, w, n) for n in lengths for b in batches for w in windows]
    rows = []
    for which, batch, window, length in wanted:
        log.print(f"batch {batch}, window {window}, {length} cached …", style="dim")
        step = SteadyStep(
            which,
            batch_size=batch,
            window=window,
            kv_length=length,
            page_size=page_size,
            backend=backend,
            # The same for all steps, as it is in one engine.
            max_positions=max(model.spec.max_positions, max(lengths) + max(windows)),
        )
        rows.append(measure_step(step, rates, num_steps=steps))
    return rates, rows


def engine_gaps(
    model: Transformer, sizes: list[int], num_tokens: int, page_size: int, backend: str
) -> dict[str, Any]:
    """Measure an engine that decodes one token per request and forward in a constant window."""
    from d2f.diffusion.policy import DecodingPolicy
    from d2f.engine.engine import EngineConfig
    from d2f.engine.request import Request
    from d2f.engine.steady import BLOCK_SIZE
    from d2f.evaluation.answering import fitted_engine
    from d2f.evaluation.step import measure_engine

    batch, window, length = sizes
    spec, causal = model.spec, model.spec.architecture.causal
    length = max(min(length, spec.max_positions - num_tokens), 1)
    size = min(BLOCK_SIZE, window)
    draw = random.Random(0)
    requests = [
        Request(
            prompt_ids=[draw.randrange(spec.vocab_size) for _ in range(length)],
            max_new_tokens=num_tokens,
            policy=DecodingPolicy(
                block_size=size, add_threshold=0, max_live_blocks=-(-window // size)
            ),
            eos_token_id=(),
            strategy="autoregressive" if causal else "pipelined",
        )
        for _ in range(batch)
    ]
    config = EngineConfig(
        max_batch_size=batch,
        page_size=page_size,
        backend=backend,
        imposed_acceptance=None if causal else (1,),
    )
    engine = fitted_engine(model, config, longest=length + num_tokens, memory_share=1.0)
    log.print("the engine, with 1 token imposed per forward …", style="dim")
    gaps = measure_engine(engine, requests)
    engine.close()
    return {"batch_size": batch, "window": 1 if causal else window, "prompt_length": length, **gaps}


def summarize(rates: Rates, rows: list[StepCost], gaps: dict[str, Any] | None) -> dict[str, Any]:
    """Collect all numbers and ratios of a run."""
    from d2f.evaluation.step import kv_ratio, step_ratio

    return {
        "rates": rates.to_dict(),
        "steps": rows,
        "step_over_autoregressive": step_ratio(rows),
        "added_time_over_reading_added_kv": kv_ratio(rows, rates),
        "engine": gaps,
    }


def _print_report(report: dict[str, Any]) -> None:
    environment, model, rates = (report[name] for name in ("environment", "model", "rates"))
    kind = "random weights" if model["random_weights"] else "its own weights"
    out.print(
        f"[bold]{model['name']}[/bold], {counted(model['num_layers'], 'layer')}, {kind}, "
        f"{environment['dtype']}, on {environment['processor']}"
    )
    out.print(
        f"Copying on the device {rates['copy_bytes_per_second'] / 1e9:,.0f} GB/s (read + written), "
        f"a product of {rates['matmul_size']:,} x {rates['matmul_size']:,} "
        f"{rates['matmul_flops_per_second'] / 1e12:,.1f} TFLOP/s\n"
    )
    out.print(_table(report["steps"]))
    for line in report["step_over_autoregressive"]:
        out.print(
            f"batch {line['batch_size']}, window {line['window']}, {line['kv_length']} cached: "
            f"[bold]{line['ratio']:.2f}x[/bold] the autoregressive step"
        )
    for line in report["added_time_over_reading_added_kv"]:
        short, long = line["kv_lengths"]
        out.print(
            f"{line['strategy']}, batch {line['batch_size']}, window {line['window']}, {short} -> "
            f"{long} cached: {line['added_ms']:.2f} ms more, [bold]{line['ratio']:.2f}x[/bold] "
            f"reading the added keys and values ({line['added_read_ms']:.2f} ms)"
        )
    if engine := report["engine"]:
        out.print(
            f"The engine at batch {engine['batch_size']}, window {engine['window']} (1 token "
            f"imposed per forward): device idle [bold]{engine['idle_share']:.1%}[/bold] of the "
            f"time between decode-only steps, at most {engine['idle_share_at_most']:.1%}; step p50 "
            f"{engine['step_ms_p50']:.2f} ms, p99 {engine['step_ms_p99']:.2f} ms; the host's own "
            f"work {engine['host_ms_per_step']:.2f} ms per step; start-up "
            f"{engine['seconds_to_start']:.1f} s"
        )
    out.print(
        "\nfloor: reading all weights but the embeddings once, at the rate of a copy; x floor: how "
        "many times longer the step takes, so 1 is a step bound by memory alone. of matmul: share "
        "of the large product's rate that the step's products reach, which matters once many "
        "tokens share a step's weights.",
        style="dim",
    )


def _table(steps: list[dict[str, Any]]) -> Any:
    table = plain_table(names=[""], numbers=tuple(_COLUMNS))
    for row in steps:
        shown = row | {
            "gb": (row["weight_bytes"] + row["kv_bytes"]) / 1e9,
            "tflop": (row["product_flops"] + row["attention_flops"]) / 1e12,
        }
        table.add_row(row["strategy"], *(form.format_map(shown) for form in _COLUMNS.values()))
    return table
