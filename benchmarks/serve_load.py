"""Load a server with many clients at once, and check every answer against the engine's own.

    python benchmarks/serve_load.py --clients 64 --seconds 60 --json load.json

The server has the shipped student in float32, where temperature 0 gives the same ids in any batch.
It, the load and this script are three processes. With one of the --threads, the CPU time outside of
the engine's thread is what HTTP, JSON and events cost. The script exits with 1 if an answer is not
the engine's own.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from load.answers import DTYPE, SEED, make_pool
from load.server import ServerProcess, Target
from load.turns import (
    MODES,
    Turn,
    count_wrong,
    idle_report,
    megabytes,
    run_load,
    run_turn,
    summarize,
)

from d2f.cli.console import check_writable, log, out, plain_table, shown, write_numbers
from d2f.cli.device import choose_device
from d2f.cli.usage import UsageError, usage
from d2f.errors import D2FError, counted
from d2f.evaluation.environment import describe_environment


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    whole, seconds = at_least(1, int), at_least(0.1, float)
    parser.add_argument("--clients", type=whole, default=64, help="requests at a time")
    parser.add_argument("--seconds", type=seconds, default=60.0, help="of load, all turns together")
    parser.add_argument("--mode", choices=[*MODES, "both"], default="both", help="both: in turns")
    parser.add_argument("--num-prompts", type=whole, default=128, help="different problems")
    parser.add_argument("--max-tokens", type=whole, default=160, help="most tokens of an answer")
    parser.add_argument("--threads", type=whole, default=1, help="of the server's matrix products")
    parser.add_argument("--url", help="a running `d2f serve --dtype float32`; default: its own")
    parser.add_argument("--api-key", help="--url: its key")
    parser.add_argument("--device", help="cpu, cuda, …")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args(arguments)
    if options.url is None and options.api_key is not None:
        parser.error("--api-key is for the server of --url")
    return options


def at_least(least: float, kind: Callable[[str], float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        if not least <= kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least} and finite")
        return kind(text)

    read.__name__ = kind.__name__
    return read


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        check_writable(options.json)
        with usage():
            options.device = choose_device(options.device)
        measure(options)
    except D2FError as error:
        log.print(f"serve_load: {error}", markup=False, soft_wrap=True)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None


def measure(options: argparse.Namespace) -> None:
    # The server first: it may not start, and it costs nothing while it has nothing to do.
    with server(options.url, options.device, options.threads) as address:
        with usage():
            target = Target.find(address, max_tokens=options.max_tokens, api_key=options.api_key)
        problems = counted(options.num_prompts, "problem")
        log.print(f"the engine's own answers to {problems} …", style="dim")
        pool = make_pool(options.num_prompts, options.max_tokens, options.device, options.threads)
        log.print("an idle server …", style="dim")
        idle = run_turn(
            target, pool.idle, mode="streamed", num_clients=1, seconds=None, provisional=True
        )
        log.print("warm-up …", style="dim")
        clients = options.clients
        # All prompts, so that the pages that they fill are not taken for a leak.
        warm_up = run_turn(target, pool.busy, mode="plain", num_clients=clients, seconds=None)
        turns = run_load(
            target,
            pool.busy,
            mode=options.mode,
            num_clients=clients,
            seconds=options.seconds,
            on_turn=say,
        )
    report = {
        "environment": describe_environment(device=options.device, dtype=DTYPE),
        "settings": {
            "clients": clients, "seconds": options.seconds, "mode": options.mode,
            "num_prompts": options.num_prompts, "max_tokens": options.max_tokens, "seed": SEED,
            "server_threads": None if options.url else options.threads, "model": target.model,
        },
        "idle": idle_report(idle, pool.block_seconds),
        "rows": summarize(turns),
        "resident_mb": {
            "before": megabytes(turns[0].before.resident_bytes),
            "after": megabytes(turns[-1].after.resident_bytes),
        },
    }  # fmt: skip
    print_report(report)
    write_numbers(options.json, report)
    every = [idle, warm_up, *turns]
    if wrong := count_wrong(every):
        total = sum(len(turn.verdicts) for turn in every)
        raise D2FError(f"{wrong} of {total} answers are not the engine's own (warm-up included)")


@contextmanager
def server(url: str | None, device: str, threads: int) -> Iterator[str]:
    """The address of the server that is measured."""
    if url is not None:
        yield url
        return
    log.print("starting d2f serve …", style="dim")
    arguments = ["--device", device, "--dtype", DTYPE]
    with ServerProcess(arguments, num_threads=threads) as process:
        yield process.url
        process.terminate()
        code = process.wait()
        if code != 0:
            raise D2FError(f"the server ended with exit code {code} after its signal to stop")


def say(turn: Turn) -> None:
    right = turn.verdicts.count("right")
    log.print(
        f"{turn.mode}, {turn.seconds:.1f} s: {right} of {counted(len(turn.verdicts), 'request')} "
        "answered and right",
        style="dim",
    )


def print_report(report: Mapping[str, Any]) -> None:
    environment, settings, idle = report["environment"], report["settings"], report["idle"]
    memory = report["resident_mb"]
    out.print(
        f"{settings['model']}, {environment['dtype']}, on {environment['processor']}: "
        f"{counted(settings['clients'], 'client')}\n"
    )
    out.print(table(report["rows"]))
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


def table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The rows of a report, with a column for each mode."""
    found = plain_table(3)
    found.add_column("", no_wrap=True)
    for row in rows:
        found.add_column(row["name"], justify="right", no_wrap=True)
    for line in zip(*map(cells, rows), strict=True):
        found.add_row(line[0][0], *(cell for _, cell in line))
    return found


def cells(row: Mapping[str, Any]) -> list[tuple[str, str]]:
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
        ("ms to first text, p50/p95/p99", three(first)),
        ("ms of a request, p50/p95/p99", three(row["request_ms"])),
        ("CPU ms/token, engine", shown(cpu and cpu["engine_ms_per_token"], ".3f")),
        ("CPU ms/token, all else", shown(cpu and cpu["other_ms_per_token"], ".3f")),
        ("… share of the engine's", shown(cpu and cpu["other_over_engine"], ".1%")),
        ("cores of the load generator", f"{row['load_cpu_share']:.2f}"),
    ]


def three(milliseconds: Mapping[str, float] | None) -> str:
    if milliseconds is None:
        return "–"
    return "/".join(f"{value:.0f}" for value in milliseconds.values())


if __name__ == "__main__":
    main()
