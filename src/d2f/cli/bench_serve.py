"""`d2f bench serve`: a server under load, and whether its answers are right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2f.cli.bench_options import DeviceOption, JsonOption
from d2f.cli.console import check_writable, log, out, plain_table, shown, write_numbers
from d2f.cli.serve import require_packages
from d2f.cli.usage import UsageError, usage
from d2f.errors import D2FError, counted

if TYPE_CHECKING:
    from d2f.evaluation.serve_load import Expected, Turn

NUM_IDLE = 20
"""The number of prompts that one client asks of the idle server."""
SEED = 2026
DTYPE = "float32"
"""The dtype in which a batch changes no answer."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The prompts that the server is asked, with the answers that it must give."""

    busy: Sequence[Expected]
    idle: Sequence[Expected]
    """Prompts that are new to the server; they are asked first, one at a time."""
    block_seconds: Sequence[float]
    """Seconds that the engine alone takes for the first block of each of them."""


def serve_command(
    clients: Annotated[int, typer.Option(help="Requests at a time.", min=1)] = 64,
    seconds: Annotated[float, typer.Option(help="Of load, all turns together.", min=0.1)] = 60.0,
    mode: Annotated[str, typer.Option(help="streamed, plain or both, in turns.")] = "both",
    num_prompts: Annotated[int, typer.Option(help="Different problems.", min=1)] = 128,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 160,
    threads: Annotated[int, typer.Option(help="Of the server's matrix products.", min=1)] = 1,
    url: Annotated[
        str | None, typer.Option(help="A running `d2f serve --dtype float32`. Default: its own.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="--url: its key.")] = None,
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Load a server with many clients at once and check every answer against the engine's own.

    The server has the shipped student in float32, where temperature 0 gives the same ids in any
    batch. It, the load and this command are three processes. With one of the --threads, the CPU
    time outside of the engine's thread is what HTTP, JSON and events cost.

    Example:  d2f bench serve --clients 64 --seconds 60 --json load.json
    """
    check_writable(json_file)
    if url is None and api_key is not None:
        raise UsageError("--api-key is for the server of --url")
    require_packages()
    from d2f.cli.device import choose_device
    from d2f.evaluation.environment import describe_environment
    from d2f.evaluation.measured_server import Target
    from d2f.evaluation.serve_load import (
        MODES,
        idle_report,
        run_load,
        run_turn,
        summarize,
    )
    from d2f.recipe import one_of

    with usage():
        one_of("mode", mode, (*MODES, "both"))
    device = choose_device(device)
    # The server first: it may not start, and it costs nothing while it has nothing to do.
    with _server(url, device, threads) as address:
        with usage():
            target = Target.find(address, max_tokens=max_tokens, api_key=api_key)
        pool = make_pool(num_prompts, max_tokens, device, threads)
        log.print("an idle server …", style="dim")
        idle = run_turn(
            target, pool.idle, mode="streamed", num_clients=1, seconds=None, provisional=True
        )
        log.print("warm-up …", style="dim")
        # All prompts, so that the pages that they fill are not taken for a leak.
        warm_up = run_turn(target, pool.busy, mode="plain", num_clients=clients, seconds=None)
        turns = run_load(
            target, pool.busy, mode=mode, num_clients=clients, seconds=seconds, on_turn=_say
        )
    report = {
        "environment": describe_environment(device=device, dtype=DTYPE),
        "settings": {
            "clients": clients, "seconds": seconds, "mode": mode, "num_prompts": num_prompts,
            "max_tokens": max_tokens, "seed": SEED, "server_threads": None if url else threads,
            "model": target.model,
        },
        "idle": idle_report(idle, pool.block_seconds),
        "rows": summarize(turns),
        "resident_mb": _memory(turns),
    }  # fmt: skip
    _print_report(report)
    write_numbers(json_file, report)
    _check_answers([idle, warm_up, *turns])


def _check_answers(turns: Sequence[Turn]) -> None:
    """Fail where a server gave other answers than the engine."""
    from d2f.evaluation.serve_load import count_wrong

    if wrong := count_wrong(turns):
        total = sum(len(turn.verdicts) for turn in turns)
        raise D2FError(f"{wrong} of {total} answers are not the engine's own (warm-up included)")


def make_pool(num_prompts: int, max_tokens: int, device: str, threads: int) -> Pool:
    """Word problems with the engine's own answers, and the seconds of each first block."""
    import torch

    from d2f.engine.engine import Engine
    from d2f.engine.generate import generate_ids
    from d2f.engine.request import Request
    from d2f.evaluation.serve_load import Expected, first_block_seconds
    from d2f.models.checkpoint import load_model
    from d2f.problems import generate_problems
    from d2f.shipped import shipped_model
    from d2f.text import Tokenizer

    log.print(f"the engine's own answers to {counted(num_prompts, 'problem')} …", style="dim")
    # As many as the server has: products are summed in the same order.
    torch.set_num_threads(threads)
    model = load_model(shipped_model("student"), device=device, dtype=DTYPE)
    tokenizer = Tokenizer.load(shipped_model("student"))
    problems = generate_problems(num_prompts + NUM_IDLE, seed=SEED, split="test")
    prompts = [problem.prompt for problem in problems]
    ids = [tokenizer.encode_prompt(prompt, chat=False) for prompt in prompts]
    results = generate_ids(model, ids, max_new_tokens=max_tokens)
    expected = [
        Expected(
            prompt=prompt,
            text=tokenizer.decode(result.token_ids),
            num_tokens=len(result.token_ids),
            finish_reason="stop" if result.finish_reason == "eos" else "length",
        )
        for prompt, result in zip(prompts, results, strict=True)
    ]
    alone = [Request(prompt_ids=p, max_new_tokens=max_tokens) for p in ids[:NUM_IDLE]]
    engine = Engine(model)
    block_seconds = first_block_seconds(engine, alone)
    engine.close()
    return Pool(busy=expected[NUM_IDLE:], idle=expected[:NUM_IDLE], block_seconds=block_seconds)


@contextmanager
def _server(url: str | None, device: str, threads: int) -> Iterator[str]:
    """The address of the server that is measured."""
    from d2f.evaluation.measured_server import ServerProcess

    if url is not None:
        yield url
        return
    log.print("starting d2f serve …", style="dim")
    arguments = ["--device", device, "--dtype", DTYPE]
    with ServerProcess(arguments, num_threads=threads) as server:
        yield server.url
        server.terminate()
        code = server.wait()
        if code != 0:
            raise D2FError(f"the server ended with exit code {code} after its signal to stop")


def _say(turn: Turn) -> None:
    right = turn.verdicts.count("right")
    log.print(
        f"{turn.mode}, {turn.seconds:.1f} s: {right} of {counted(len(turn.verdicts), 'request')} "
        "answered "
        "and right",
        style="dim",
    )


def _memory(turns: Sequence[Turn]) -> dict[str, float | None]:
    before, after = turns[0].before.resident_bytes, turns[-1].after.resident_bytes
    return {
        "before": None if before is None else before / 1e6,
        "after": None if after is None else after / 1e6,
    }


def _print_report(report: Mapping[str, Any]) -> None:
    environment, settings, idle = report["environment"], report["settings"], report["idle"]
    memory = report["resident_mb"]
    out.print(
        f"{settings['model']}, {environment['dtype']}, on {environment['processor']}: "
        f"{counted(settings['clients'], 'client')}\n"
    )
    out.print(_table(report["rows"]))
    out.print()
    for row in report["rows"]:
        for fault, count in row["faults"].items():
            out.print(f"{row['name']}, {count}x: {fault}", markup=False)
    first, block, outside = (
        idle[f"{name}_ms"] for name in ("first_text", "block", "outside_engine")
    )
    if first is not None:
        out.print(
            f"Idle server, one client: first text after {first['p50']:.0f} ms (p99 "
            f"{first['p99']:.0f}); the first block's forwards take the engine alone "
            f"{block['p50']:.0f} ms; at most {idle['most_beyond_block_ms']:+.0f} ms beyond them"
        )
    if outside is not None:
        out.print(
            f"… of it outside of the engine's steps: {outside['p50']:.1f} ms (p99 "
            f"{outside['p99']:.1f})"
        )
    if memory["before"] is not None and memory["after"] is not None:
        out.print(f"Server's memory: {memory['before']:.0f} MB, then {memory['after']:.0f} MB")
    out.print(
        "\nEvery answer is compared with generate_ids: text, tokens, end. Percentiles are of "
        "answered requests; a turn ends with its last answer. CPU: the server's, by its metrics. "
        "All prompts were asked once before.",
        style="dim",
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The rows of a report, with a column for each mode."""
    table = plain_table(3)
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row["name"], justify="right", no_wrap=True)
    for cells in zip(*map(_cells, rows), strict=True):
        table.add_row(cells[0][0], *(cell for _, cell in cells))
    return table


def _cells(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    cpu, first = row["cpu"], row["first_text_ms"]
    spread = "/".join
    return [
        ("seconds, turns", f"{row['seconds']:.1f}, {row['num_turns']}"),
        ("requests", str(row["num_requests"])),
        ("… answered and right", str(row["num_right"])),
        (
            "… lost/doubled/mixed/wrong",
            spread(str(row[f"num_{kind}"]) for kind in ("lost", "doubled", "mixed", "wrong")),
        ),
        ("… 429/other errors", f"{row['num_refused']}/{row['num_failed']}"),
        ("tokens/s", f"{row['tokens_per_second']:.0f}"),
        ("requests/s", f"{row['requests_per_second']:.1f}"),
        ("tokens/forward", shown(row["tokens_per_forward"], ".2f")),
        ("ms to first text, p50/p95/p99", _three(first)),
        ("ms of a request, p50/p95/p99", _three(row["request_ms"])),
        ("CPU ms/token, engine", shown(cpu and cpu["engine_ms_per_token"], ".3f")),
        ("CPU ms/token, all else", shown(cpu and cpu["other_ms_per_token"], ".3f")),
        ("… share of the engine's", shown(cpu and cpu["other_over_engine"], ".1%")),
        ("cores of the load generator", f"{row['load_cpu_share']:.2f}"),
    ]


def _three(milliseconds: Mapping[str, float] | None) -> str:
    if milliseconds is None:
        return "–"
    return "/".join(f"{value:.0f}" for value in milliseconds.values())
