"""`d2f eval`: run a recipe of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2f.cli.bench_options import Machine, source_label
from d2f.cli.console import log, out, plain_table, shown
from d2f.cli.decoding_options import with_option_groups
from d2f.cli.model_files import weights_sha256
from d2f.cli.usage import check_command, load_with, usage
from d2f.errors import counted

if TYPE_CHECKING:
    from d2f.evaluation.eval_recipe import EvalRecipe
    from d2f.evaluation.eval_row import LoadedModel


@with_option_groups
def eval_command(
    *,
    recipe: Annotated[Path, typer.Argument(help="A TOML file, or one of `d2f recipes`.")],
    data: Annotated[
        str | None, typer.Option(help="Folder of the benchmark's files, in place of the hub.")
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Ask the hub for no benchmark's files.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write to; the recipe names one.")
    ] = None,
    num_problems: Annotated[
        int | None, typer.Option(help="The first so many problems only.", min=1)
    ] = None,
    rows: Annotated[str | None, typer.Option(help="These rows only, as pipelined,serial.")] = None,
    machine: Machine,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Throw away earlier results of these rows.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Replace a setting, as rows.serial.temperature=1."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summaries as JSON to stdout.")
    ] = False,
) -> None:
    """Score methods on a benchmark and measure their speed side by side.

    Each row has a folder in OUTPUT: problems.jsonl, speed.jsonl and summary.json. Ctrl-C loses
    nothing; the same command goes on. `d2f report OUTPUT` makes tables and plots of it.

    Example:  d2f eval recipes/eval/word_problems.toml --num-problems 20 --rows pipelined,serial
    """
    from d2f.evaluation.eval_recipe import load_eval_recipe

    overrides = list(settings or [])
    for key, value in (("data", data), ("output", output)):
        if value is not None:
            overrides.append(f"{key}={json.dumps(str(value))}")
    if offline:
        overrides.append("offline=true")
    check_command(recipe, "eval")
    loaded = load_with(load_eval_recipe, recipe, overrides)
    names = [name.strip() for name in rows.split(",")] if rows is not None else []
    with usage():
        if num_problems is not None:
            loaded = loaded.limited(num_problems)
        loaded.selected(names)
    # As it was typed, so that it can be typed again, but nobody's home directory.
    file = recipe.name if recipe.is_absolute() else recipe.as_posix()
    summaries = _evaluate(loaded, names, file, machine, fresh)
    if as_json:
        typer.echo(json.dumps({"output": loaded.output, "rows": summaries}))
        return
    _print_table(loaded, summaries)


def _evaluate(
    recipe: EvalRecipe,
    rows: Sequence[str],
    recipe_file: str,
    machine: Machine,
    fresh: bool,
) -> list[dict[str, Any]]:
    from d2f.evaluation.environment import describe_environment
    from d2f.evaluation.eval_progress import Terminal
    from d2f.evaluation.eval_run import Evaluation
    from d2f.evaluation.sandbox import sandbox_kind
    from d2f.evaluation.tasks import CODE_TASKS, load_task

    device, dtype = machine.chosen()
    task = load_task(
        recipe.task,
        num_examples=recipe.num_examples,
        seed=recipe.seed,
        split=recipe.split,
        data=recipe.data,
        offline=recipe.offline,
        num_fewshot=recipe.num_fewshot,
        clean_up=recipe.clean_up,
    )
    environment = describe_environment(device=device, dtype=dtype)
    if recipe.task in CODE_TASKS:
        environment["sandbox"] = sandbox_kind()
    evaluation = Evaluation(
        recipe,
        task,
        _loader(recipe, device, dtype),
        environment,
        rows=rows,
        backend=machine.backend,
        recipe_file=recipe_file,
        fresh=fresh,
    )
    reporter = Terminal()
    try:
        return evaluation.run(reporter)
    except KeyboardInterrupt:
        reporter.close()
        raise KeyboardInterrupt(
            f"stopped; all answers so far are in {recipe.output}; go on with the same command"
        ) from None
    finally:
        reporter.close()


def _loader(recipe: EvalRecipe, device: str, dtype: str) -> Callable[[str], LoadedModel]:
    """Make the function that loads a model by its name in the recipe."""

    def load(name: str) -> LoadedModel:
        from d2f.evaluation.eval_row import LoadedModel
        from d2f.models.checkpoint import load_model
        from d2f.text import Tokenizer

        entry = recipe.models[name]
        source = entry.path
        log.print(f"loading {entry.path}", style="dim", markup=False)
        # Fails in milliseconds where the weights may take minutes.
        tokenizer = Tokenizer.load(source)
        model = load_model(source, adapter=entry.adapter, device=device, dtype=dtype)
        return LoadedModel(
            model=model,
            tokenizer=tokenizer,
            description={
                "name": source_label(source),
                "adapter": entry.adapter,
                "num_parameters": model.spec.num_parameters,
                "sha256": weights_sha256(source, entry.adapter),
            },
        )

    return load


def _print_table(recipe: EvalRecipe, summaries: Sequence[Mapping[str, Any]]) -> None:
    """Print a table whose columns fit in 80 characters where names are short."""
    columns = (
        "prob-\nlems", "score", "tokens/\nforward", "query\ntokens/\nforward", "mean\ntokens",
        "tokens\nper s", "s per\nanswer", "ms/\nforward",
    )  # fmt: skip
    table = plain_table(names=[""], numbers=columns)
    for summary in summaries:
        table.add_row(summary["row"], *_cells(summary["score"], summary["speed"]))
    out.print(f"\n[bold]{recipe.test_set}[/bold], {recipe.family}\n")
    out.print(table)
    failed = sum((summary["score"] or {}).get("num_errors", 0) for summary in summaries)
    if failed:
        out.print(
            f"\n{counted(failed, 'problem')} failed and "
            f"{'counts' if failed == 1 else 'count'} as wrong; problems.jsonl says why."
        )
    if recipe.speed is not None:
        out.print(
            f"\nSpeed: medians of {counted(recipe.speed.num_runs, 'round')} side by side, "
            "prompts included.",
            style="dim",
        )
    out.print(f"Results in {recipe.output}")


def _cells(
    score: Mapping[str, Any] | None, speed: Mapping[str, Any] | None
) -> tuple[str, str, str, str, str, str, str, str]:
    counts = score or speed or {}
    rate, seconds = (
        (speed or {}).get(k) or {} for k in ("tokens_per_second", "seconds_per_problem")
    )
    return (
        str(counts.get("num_problems", "–")),
        f"{score['score']:.1%} ±{100 * score['standard_error']:.1f}" if score else "–",
        shown(counts.get("tokens_per_forward"), ".2f"),
        shown(counts.get("query_tokens_per_forward"), ".0f"),
        shown(counts.get("mean_tokens"), ".0f"),
        shown(rate.get("median"), ".0f"),
        shown(seconds.get("median"), ".3f"),
        shown((speed or {}).get("milliseconds_per_forward"), ".2f"),
    )
