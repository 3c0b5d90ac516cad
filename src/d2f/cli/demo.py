"""`d2f demo`: show the pipeline live, then race it against autoregression and vanilla."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2f.cli.bench_options import DeviceOption, DtypeOption
from d2f.cli.console import check_writable, log, out, plain_table, say
from d2f.cli.usage import usage
from d2f.errors import ConfigError, counted
from d2f.evaluation.results import write_json

if TYPE_CHECKING:
    from d2f.evaluation.race import Tally
    from d2f.models.transformer import Transformer
    from d2f.problems import Problem
    from d2f.text import Tokenizer

NUM_LIVE = 3
DEFAULT_PLOT = Path("d2f-demo.png")
VANILLA_BLOCK_LENGTH = 32
"""Block length of LLaDA's sampler for the teacher, which was trained on blocks."""
# name, shipped model, strategy, early stop
ROWS = (
    ("autoregressive", "autoregressive", "autoregressive", True),
    ("vanilla", "teacher", "vanilla", False),
    ("vanilla-eos-stop", "teacher", "vanilla", True),
    ("serial", "student", "serial", True),
    ("pipelined", "student", "pipelined", True),
)


def demo_command(
    num_problems: Annotated[int, typer.Option(help="Problems of the race.", min=1)] = 100,
    num_vanilla: Annotated[int, typer.Option(help="… of the two slow vanilla rows.", min=1)] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the problems.", min=0)] = 2026,
    live: Annotated[bool, typer.Option("--live/--no-live", help="Show the pipeline first.")] = True,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Where the bar plot goes: .png, .svg, .pdf, … Default: d2f-demo.png.",
            dir_okay=False,
        ),
    ] = None,
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Draw no plot.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the rows to this file.", dir_okay=False)
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Solve word problems live, then race D2F against autoregression and vanilla diffusion.

    The models are shipped with the package, the problems are made up on the spot and were not
    trained on. Nothing is downloaded.

    Example:  d2f demo --num-problems 200 --json race.json
    """
    picture = None if no_plot else _choose_plot(plot)
    check_writable(json_file, picture)
    from d2f.cli.device import choose_device, choose_dtype, choose_threads
    from d2f.evaluation.environment import describe_environment
    from d2f.models.checkpoint import load_model, read_spec
    from d2f.problems import generate_problems
    from d2f.shipped import MODELS, shipped_model
    from d2f.text import Tokenizer

    device = choose_device(device)
    choose_threads(read_spec(shipped_model("student")).num_parameters, device)
    dtype = choose_dtype(dtype, device)
    models = {name: load_model(shipped_model(name), device=device, dtype=dtype) for name in MODELS}
    tokenizer = Tokenizer.load(shipped_model("student"))
    problems = list(generate_problems(num_problems, seed=seed, split="test"))
    environment = describe_environment(device=device, dtype=dtype)
    threads = f"{counted(environment['num_threads'], 'thread')}, " if device == "cpu" else ""
    out.print(f"[bold]d2f demo[/bold]  on {environment['processor']}, {threads}{dtype}\n")
    if live:
        _show_live(models["student"], tokenizer, seed)
    rows, limit = _race(models, tokenizer, problems, min(num_vanilla, num_problems))
    summaries = [row.summary() for row in rows]
    _print_table(summaries)
    _print_reasons({row["name"]: row for row in summaries}, rows, limit)
    if json_file is not None:
        settings = {"seed": seed, "max_new_tokens": limit, "batch_size": 1}
        write_json(json_file, {"environment": environment | settings, "rows": summaries})
        out.print(f"Rows written to {json_file}")
    if picture is not None:
        from d2f.evaluation.plot import plot_race

        title = (
            f"{counted(num_problems, 'word problem')}, one at a time, on {environment['processor']}"
        )
        plot_race(summaries, picture, title=title)
        out.print(f"Plot drawn in {picture}")
    say(out, 'Ask it yourself:  d2f generate "Tom has 5 apples. Ann has 3 times as many …"')


def _choose_plot(wanted: Path | None) -> Path | None:
    """Choose the plot's file; None where nobody asked for a plot and matplotlib is missing."""
    if find_spec("matplotlib") is not None:
        from d2f.evaluation.plot import check_format

        with usage():
            check_format(wanted or DEFAULT_PLOT)
        return wanted or DEFAULT_PLOT
    if wanted is not None:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib")
    log.print("no matplotlib here, so no plot is drawn (pip install matplotlib)", style="dim")
    return None


def _show_live(model: Transformer, tokenizer: Tokenizer, seed: int) -> None:
    from rich.text import Text

    from d2f.cli.live import SIGNS, SLOWED_SECONDS, legend, render_blocks, watch_answer
    from d2f.engine.engine import Engine
    from d2f.engine.request import Request
    from d2f.problems import ProblemConfig, extract_answer, generate_problems

    if out.is_terminal:
        out.print(legend())
    slowed = f", slowed down to {SLOWED_SECONDS} s per forward" if out.is_terminal else ""
    say(out, f"[dim]Three long problems told out of order{slowed}; {SIGNS}[/dim]\n")
    engine = Engine(model)
    # Easy problems are decoded in so few forwards that there is little to see.
    hard = ProblemConfig(min_steps=6, shuffle_rate=1.0)
    for problem in generate_problems(NUM_LIVE, seed=seed, split="test", config=hard):
        out.print(Text(problem.prompt, style="bold"), soft_wrap=False)
        request = Request(prompt_ids=tokenizer.encode_prompt(problem.prompt), max_new_tokens=192)
        watched = watch_answer(out, engine, request, tokenizer, slow=SLOWED_SECONDS)
        output = watched.output
        assert output is not None and output.result is not None
        if out.is_terminal:
            out.print(render_blocks(output.blocks, tokenizer), soft_wrap=False)
        token_ids, forwards = output.result.token_ids, counted(watched.num_forwards, "forward")
        right = extract_answer(tokenizer.decode(token_ids)) == problem.answer
        say(
            out,
            f"[dim]{counted(len(token_ids), 'token')} in {forwards}: "
            f"{'right' if right else 'wrong'}, the answer is {problem.answer}[/dim]\n",
        )


def _race(
    models: Mapping[str, Transformer],
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    num_vanilla: int,
) -> tuple[list[Tally], int]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from d2f.engine.engine import Engine
    from d2f.engine.request import Request
    from d2f.evaluation.race import Entrant, gold_limit, race_by_problem
    from d2f.problems import extract_answer

    engines = {name: Engine(model) for name, model in models.items()}
    policy = models["student"].spec.recommended_policy
    responses = [problem.response for problem in problems]
    limit = gold_limit(responses, tokenizer, policy.block_size if policy else 32)
    prompts = [tokenizer.encode_prompt(problem.prompt) for problem in problems]

    def is_right(index: int, token_ids: Sequence[int]) -> bool:
        return extract_answer(tokenizer.decode(token_ids)) == problems[index].answer

    entrants = [
        Entrant(
            name=name,
            engine=engines[model],
            requests=[
                Request(
                    prompt_ids=prompt,
                    max_new_tokens=limit,
                    strategy=strategy,
                    options={"block_length": VANILLA_BLOCK_LENGTH} if strategy == "vanilla" else {},
                    early_stop=early_stop,
                )
                for prompt in prompts[: num_vanilla if strategy == "vanilla" else len(prompts)]
            ],
            is_right=is_right,
        )
        for name, model, strategy, early_stop in ROWS
    ]
    name, right = TextColumn("{task.description:>16}"), TextColumn("{task.fields[right]} right")
    columns = (name, BarColumn(), MofNCompleteColumn(), right, TimeElapsedColumn())
    with Progress(*columns, console=log) as progress:
        tasks = {
            e.name: progress.add_task(e.name, total=len(e.requests), right=0) for e in entrants
        }
        num_right = dict.fromkeys(tasks, 0)

        def on_answer(name: str, correct: bool) -> None:
            num_right[name] += correct
            progress.update(tasks[name], advance=1, right=num_right[name])

        return race_by_problem(entrants, on_answer), limit


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the race as a table whose columns fit in 80 characters."""
    gap = 1 if out.width < 100 else 3
    columns = (
        "prob-\nlems", "score", "tokens\nper s", "tokens/\nforward", "query\ntokens/\nforward",
        "ms/\nforward", "s per\nanswer", "mean\ntokens",
    )  # fmt: skip
    table = plain_table(gap, names=[""], numbers=columns)
    for row in rows:
        table.add_row(
            row["name"],
            str(row["num_problems"]),
            f"{row['score']:.1%} ±{100 * row['score_standard_error']:.1f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['tokens_per_forward']:.2f}",
            f"{row['query_tokens_per_forward']:.0f}",
            f"{row['milliseconds_per_forward']:.2f}",
            f"{row['seconds_per_problem']:.3f}",
            f"{row['mean_tokens']:.0f}",
            style="bold" if row["name"] == "pipelined" else "",
        )
    out.print("\n[bold]The race[/bold], one problem at a time, prompts included in the clock\n")
    out.print(table)
    out.print()


def _print_reasons(
    rows: Mapping[str, Mapping[str, Any]], answers: Sequence[Tally], limit: int
) -> None:
    """Print what makes each ratio: tokens per forward, against what a forward costs."""
    from d2f.evaluation.race import paired_difference

    fast = rows["pipelined"]
    for name in ("autoregressive", "vanilla", "vanilla-eos-stop", "serial"):
        slow = rows[name]
        speed = fast["tokens_per_second"] / slow["tokens_per_second"]
        yields = fast["tokens_per_forward"] / slow["tokens_per_forward"]
        costs = fast["milliseconds_per_forward"] / slow["milliseconds_per_forward"]
        ratios = f"{yields:.1f}x the tokens/forward, {costs:.2f}x ms/forward"
        say(out, f"pipelined is [bold]{speed:.1f}x {name}[/bold]: {ratios}")
    by_name = {row.name: row for row in answers}
    gap, error = paired_difference(by_name["pipelined"], by_name["autoregressive"])
    out.print(f"Score, pipelined minus autoregressive: {gap:+.1%} ±{100 * error:.1f} (paired)")
    out.print(
        "Tokens computed for each token of an answer: "
        f"vanilla {rows['vanilla']['computed_per_answered']:.0f}, "
        f"pipelined {fast['computed_per_answered']:.1f}, "
        f"autoregressive {rows['autoregressive']['computed_per_answered']:.1f}; "
        f"{counted(limit, 'new token')} at most.\n",
        style="dim",
        soft_wrap=False,
    )
