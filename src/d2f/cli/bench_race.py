"""`d2f bench race`: measure strategies side by side on the same prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2f.cli.bench_options import (
    JsonOption,
    Machine,
    PageSizeOption,
    Source,
    describe_model,
    numbers,
    source_label,
)
from d2f.cli.console import check_writable, log, out, plain_table, shown, write_numbers
from d2f.cli.decoding_options import with_option_groups
from d2f.cli.usage import UsageError
from d2f.errors import ConfigError, counted
from d2f.evaluation.results import write_json

if TYPE_CHECKING:
    from d2f.engine.engine import Engine
    from d2f.evaluation.answering import Run
    from d2f.evaluation.race import Entrant
    from d2f.models.transformer import Transformer

STRATEGIES = {"pipelined": "diffusion", "serial": "diffusion", "autoregressive": "autoregressive"}
"""Strategy -> kind of the model that it decodes."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """A model of a race, and the prompts in its tokens."""

    name: str
    model: Transformer
    prompts: Sequence[Sequence[int]]
    """The same ones for both models."""
    is_right: Callable[[int, Sequence[int]], bool] | None = None
    """Whether the answer to a prompt, by its number, is right; None: nobody can say."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """The models of a race by kind, the values of `STRATEGIES`."""

    sides: Mapping[str, Side]
    limit: int
    """Most new tokens of an answer."""
    imposed: tuple[int, ...] | None = None

    def engine(self, kind: str, batch: int, page_size: int, backend: str) -> Engine:
        """Make an engine with room for `batch` requests, or for what its share of memory holds."""
        import torch

        from d2f.engine.engine import EngineConfig
        from d2f.evaluation.answering import fitted_engine

        model = self.sides[kind].model
        on_gpu = model.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
        config = EngineConfig(
            max_batch_size=batch,
            page_size=page_size,
            backend=backend,
            imposed_acceptance=None if model.spec.architecture.causal else self.imposed,
        )
        longest = self.limit + max(len(p) for side in self.sides.values() for p in side.prompts)
        share = 0.45 if on_gpu else 1.0  # the rival's engine comes, too
        return fitted_engine(model, config, longest=longest, memory_share=share)

    def entrants(self, count: int, engines: Mapping[str, Engine]) -> list[Entrant]:
        """Each strategy with so many prompts, and the engine of its model."""
        from d2f.engine.request import Request
        from d2f.evaluation.race import Entrant

        ends = () if self.imposed else None
        return [
            Entrant(
                name=strategy,
                engine=engines[kind],
                requests=[
                    Request(
                        prompt_ids=prompt,
                        max_new_tokens=self.limit,
                        eos_token_id=ends,
                        strategy=strategy,
                    )
                    for prompt in self.sides[kind].prompts[:count]
                ],
                is_right=self.sides[kind].is_right,
            )
            for strategy, kind in STRATEGIES.items()
        ]


@with_option_groups
def race_command(
    *,
    source: Source,
    baseline: Annotated[str | None, typer.Option(help="--model: its autoregressive rival.")] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, as 1,4,16,64,256.")] = "1",
    num_prompts: Annotated[int, typer.Option(help="Prompts; at least the batch.", min=1)] = 16,
    prompt_length: Annotated[int, typer.Option(help="--shape: tokens of a prompt.", min=1)] = 128,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Default: 128, or what the longest answer needs.", min=1)
    ] = None,
    accept: Annotated[
        int | None,
        typer.Option(help="--shape: tokens that each forward of a request accepts.", min=1),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="--shape: accepted tokens of the 1st, 2nd, … forward, a JSON list."),
    ] = None,
    record_trace: Annotated[
        Path | None, typer.Option(help="Write what `pipelined` accepts, for --trace.")
    ] = None,
    runs: Annotated[int, typer.Option(help="Runs of each strategy, in turns.", min=1)] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.", min=0)] = 2026,
    page_size: PageSizeOption = 16,
    machine: Machine,
    json_file: JsonOption = None,
) -> None:
    """Race D2F against autoregression in the same engine, at one or several batch sizes.

    The shipped models answer word problems. A --shape has random weights and answers nothing, so
    what it accepts per forward is imposed; the speed is real. Its rival has the same weights.

    Example:  d2f bench race --batch 1,4,16 --json race.json
    """
    batches = numbers(batch)
    check_writable(json_file, record_trace)
    from d2f.evaluation.environment import describe_environment

    shape = source.shape
    imposed = _imposed(shape, accept, trace)
    device, dtype = machine.chosen()
    most = max(num_prompts, *batches)
    if shape is not None and imposed is not None:
        built, _ = source.load(device, dtype)
        lengths = prompt_length, max_new_tokens or 128
        entered = shape_field(built, shape, lengths, imposed, most, seed)
    else:
        pair = _pair(source.model, baseline)
        entered = problem_field(pair, max_new_tokens, most, device, dtype, seed)
    raced = race_report(
        entered, batches, num_prompts, runs, page_size, machine.backend, record_trace
    )
    raced["settings"] |= {"seed": seed, "prompt_length": prompt_length if shape else None}
    report = {"environment": describe_environment(device=device, dtype=dtype), **raced}
    _print_report(report)
    write_numbers(json_file, report)


def _imposed(shape: str | None, accept: int | None, trace: Path | None) -> tuple[int, ...] | None:
    """Read how many tokens each forward of a request accepts; None: as the model decides."""
    if accept is not None and trace is not None:
        raise UsageError("--accept and --trace exclude each other")
    if shape is None:
        if accept is not None or trace is not None:
            raise UsageError("--accept and --trace are for a --shape; a real model accepts itself")
        return None
    if accept is not None:
        return (accept,)
    if trace is None:
        raise UsageError(
            "random weights accept nothing by themselves; say how much a forward accepts with "
            "--accept N or --trace FILE"
        )
    try:
        counts = json.loads(trace.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{trace} cannot be read as JSON: {error}") from None
    whole = isinstance(counts, list) and all(type(count) is int and count >= 0 for count in counts)
    if not whole or not counts:
        raise ConfigError(f"{trace} must hold a JSON list of whole numbers, one for each forward")
    return tuple(counts)


def _pair(model: str | None, baseline: str | None) -> tuple[str, str]:
    from d2f.shipped import shipped_model

    if (model is None) != (baseline is None):
        raise UsageError("--model and --baseline go together: a D2F model and its rival")
    if model is None or baseline is None:
        return str(shipped_model("student")), str(shipped_model("autoregressive"))
    return model, baseline


def shape_field(
    model: Transformer,
    shape: str,
    lengths: tuple[int, int],
    imposed: tuple[int, ...],
    most: int,
    seed: int,
) -> Field:
    """Prepare random prompts for a model of random weights and its autoregressive twin.

    `lengths` are the tokens of each prompt and of each answer.
    """
    from d2f.models.presets import autoregressive_twin

    if model.spec.architecture.causal:
        raise UsageError(f"{shape} is autoregressive; its rivals would be llada-8b or dream-7b")
    prompt_length, limit = lengths
    draw, vocabulary = random.Random(seed), range(model.spec.vocab_size)
    prompts = [draw.choices(vocabulary, k=prompt_length) for _ in range(most)]
    twin, twin_name = autoregressive_twin(model), f"{shape}, the same weights"
    return Field(
        sides={
            "diffusion": Side(name=shape, model=model, prompts=prompts),
            "autoregressive": Side(name=twin_name, model=twin, prompts=prompts),
        },
        limit=limit,
        imposed=imposed,
    )


def problem_field(
    pair: tuple[str, str], limit: int | None, most: int, device: str, dtype: str, seed: int
) -> Field:
    """Prepare the built-in problems for a D2F model and its rival, given by folders or hub ids.

    Without a `limit` answers may have as many tokens as the longest worked answer needs.
    """
    from d2f.evaluation.race import gold_limit
    from d2f.models.checkpoint import load_model
    from d2f.problems import extract_answer, generate_problems
    from d2f.text import Tokenizer

    problems = list(generate_problems(most, seed=seed, split="test"))
    tokenizers = [Tokenizer.load(name) for name in pair]

    def side(name: str, tokenizer: Tokenizer) -> Side:
        return Side(
            name=source_label(name),
            model=load_model(name, device=device, dtype=dtype),
            prompts=[tokenizer.encode_prompt(problem.prompt) for problem in problems],
            is_right=lambda index, token_ids: (
                extract_answer(tokenizer.decode(token_ids)) == problems[index].answer
            ),
        )

    sides = dict(zip(("diffusion", "autoregressive"), map(side, pair, tokenizers), strict=True))
    policy = sides["diffusion"].model.spec.recommended_policy
    size = policy.block_size if policy else 32
    responses = [problem.response for problem in problems]
    return Field(
        sides=sides,
        limit=limit or max(gold_limit(responses, each, size) for each in tokenizers),
    )


def race_report(
    entered: Field,
    batches: Sequence[int],
    num_prompts: int,
    runs: int,
    page_size: int,
    backend: str,
    record_trace: Path | None = None,
) -> dict[str, Any]:
    """Race at each batch size, and report the rows and the ratios between them."""
    from d2f.evaluation.race import acceptance_trace, race_by_run, speed_ratios

    rows: list[dict[str, Any]] = []
    last: dict[str, Run] = {}

    def on_run(name: str, run: Run) -> None:
        rate = run.num_tokens / run.seconds
        log.print(f"batch {batch}, {name}: {rate:.0f} tokens/s", style="dim")
        last[name] = run

    for batch in batches:
        engines = {kind: entered.engine(kind, batch, page_size, backend) for kind in entered.sides}
        entrants = entered.entrants(max(num_prompts, batch), engines)
        rows += race_by_run(entrants, batch, num_runs=runs, on_run=on_run)
        for engine in engines.values():
            engine.close()
        if record_trace is not None and batch == batches[0]:
            write_json(record_trace, acceptance_trace(last["pipelined"]))
    return {
        "models": {
            kind: describe_model(side.model, side.name, random=entered.imposed is not None)
            for kind, side in entered.sides.items()
        },
        "settings": {
            "max_new_tokens": entered.limit,
            "imposed_acceptance": entered.imposed,
            "page_size": page_size,
            "backend": backend,
            "num_runs": runs,
        },
        "rows": rows,
        "pipelined_over_autoregressive": speed_ratios(rows),
    }


def _print_report(report: dict[str, Any]) -> None:
    environment, settings = report["environment"], report["settings"]
    names = " against ".join(model["name"] for model in report["models"].values())
    out.print(f"{names}, {environment['dtype']}, on {environment['processor']}")
    if settings["imposed_acceptance"] is not None:
        counts = ", ".join(map(str, settings["imposed_acceptance"]))
        out.print(f"Random weights; acceptance [bold]imposed[/bold]: {counts} per forward")
    out.print()
    out.print(_table(report["rows"]))
    overtaken = report["pipelined_over_autoregressive"]["overtaken_at"]
    for line in report["pipelined_over_autoregressive"]["by_batch_size"]:
        ratios = ", ".join(
            f"{line[kind]:.2f}x {kind.replace('_', ' ')}" for kind in overtaken if line[kind]
        )
        out.print(f"batch {line['batch_size']}: pipelined is {ratios} of autoregressive")
    for kind, size in overtaken.items():
        where = f"from batch {size} on" if size else "at none of these batch sizes"
        out.print(f"Autoregression is faster {where} ({kind.replace('_', ' ')}).")
    seconds = sum(row["warm_up_seconds"] for row in report["rows"])
    out.print(
        f"\nMedian of {counted(settings['num_runs'], 'run')} in turns; {seconds:.1f} s of "
        "warm-up not counted. end to end: answer tokens / wall time, prompts included; decode "
        "only: those of steps without a prompt / the time of these.",
        style="dim",
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    columns = (
        "batch", "tokens/s,\nend to\nend", "tokens/s,\ndecode\nonly", "tokens/\nforw.",
        "query/\nforw.", "ms/\nstep", "p99", "mean\ntok.", "score",
    )  # fmt: skip
    table = plain_table(names=[""], numbers=columns)
    for row in rows:
        decode = row["decode_tokens_per_second"]
        table.add_row(
            row["name"],
            str(row["batch_size"]),
            f"{row['tokens_per_second']['median']:.0f}",
            shown(decode and decode["median"], ".0f"),
            f"{row['tokens_per_forward']:.2f}",
            f"{row['query_tokens_per_forward']:.0f}",
            f"{row['milliseconds_per_step']:.2f}",
            f"{row['step_ms_p99']:.2f}",
            f"{row['mean_tokens']:.0f}",
            shown(row["score"], ".0%"),
        )
    return table
