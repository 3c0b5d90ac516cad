"""Strategies side by side on the same prompts at several batch sizes.

A run hands all its prompts to an engine at once and lets it decode at most `batch_size` together.
Runs of the strategies take turns. Whatever an engine does once (compiling, capturing graphs) it
does before, in runs that do not count; no prompt is still cached when a run begins.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from d2f.engine.clock import StepTime
from d2f.engine.engine import Engine
from d2f.engine.request import Output, Request
from d2f.errors import ConfigError
from d2f.evaluation.metrics import percentile, spread, standard_error

MOST_WARM_UPS = 4


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One strategy of a race."""

    name: str
    model: str
    """Which engine decodes it; entrants may share one."""
    requests: Sequence[Request]
    """The same prompts in the same order for all entrants."""
    is_right: Callable[[int, list[int]], bool] | None = None
    """Whether the answer to a request, by its number, is right."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One entrant's answers to all its requests."""

    token_ids: list[list[int]]
    num_forwards: int
    """Summed over the requests."""
    num_query_tokens: int
    seconds: float
    decode_tokens: int
    """Of the answers, those that came from a step without any prompt."""
    decode_seconds: float
    """From the end of a step to the end of the next one, of the steps without any prompt."""
    steps_ms: list[float]
    """From end to end, of all steps."""
    num_preemptions: int
    num_captured: int
    """Graphs captured within the run, which it should not have to."""
    accepted: list[list[int]]
    """Of each request, how many tokens each of its forwards filled."""
    forwards: list[int] = field(default_factory=list)
    """Of each request."""
    query_tokens: list[int] = field(default_factory=list)
    """Of each request."""
    decoded_tokens: list[int | None] = field(default_factory=list)
    """Of each request, all but EOS tokens, those behind its answer too."""


@dataclass
class Result:
    """All runs of one entrant at one batch size."""

    name: str
    batch_size: int
    runs: list[Run] = field(default_factory=list)
    warm_up_seconds: float = 0.0
    num_right: int | None = None
    """Of the last run."""

    def summary(self) -> dict[str, Any]:
        """The columns of the table; speeds are medians over the runs, with lowest and highest."""
        runs, last = self.runs, self.runs[-1]
        tokens = sum(map(len, last.token_ids))
        count = len(last.token_ids)
        steps = [ms for run in runs for ms in run.steps_ms]
        score = None if self.num_right is None else self.num_right / count
        return {
            "name": self.name,
            "batch_size": self.batch_size,
            "num_prompts": count,
            "num_runs": len(runs),
            "tokens_per_second": spread([sum(map(len, r.token_ids)) / r.seconds for r in runs]),
            "decode_tokens_per_second": spread(
                [r.decode_tokens / r.decode_seconds for r in runs if r.decode_seconds > 0]
            ),
            "tokens_per_forward": tokens / last.num_forwards,
            "mean_of_tokens_per_forward": sum(
                len(ids) / max(len(forwards), 1)
                for ids, forwards in zip(last.token_ids, last.accepted, strict=True)
            )
            / count,
            "query_tokens_per_forward": last.num_query_tokens / last.num_forwards,
            "milliseconds_per_step": percentile(
                [1000 * r.seconds / max(len(r.steps_ms), 1) for r in runs], 50
            ),
            "step_ms_p50": percentile(steps, 50),
            "step_ms_p99": percentile(steps, 99),
            "seconds_per_prompt": percentile([r.seconds / count for r in runs], 50),
            "mean_tokens": tokens / count,
            "score": score,
            "score_standard_error": None if score is None else standard_error(score, count),
            "num_preemptions": last.num_preemptions,
            "num_graphs_captured_in_runs": sum(run.num_captured for run in runs),
            "warm_up_seconds": self.warm_up_seconds,
        }


def race_batch(
    entrants: Sequence[Entrant],
    engines: Mapping[str, Engine],
    batch_size: int,
    *,
    num_runs: int = 3,
    on_run: Callable[[str, Run], None] = lambda name, run: None,
) -> list[Result]:
    """Let all entrants answer their requests `num_runs` times, in turns.

    Args:
        entrants: Who takes part.
        engines: By `Entrant.model`; each with `max_batch_size` set to `batch_size`.
        batch_size: Of the engines.
        num_runs: Runs that count, of each entrant.
        on_run: Called after each of them.

    Raises:
        ConfigError: `num_runs` is below 1.
        RequestError: A request cannot be served.

    Example:
        `race_batch([Entrant(name="serial", model="student", requests=requests)],
        {"student": Engine(model, EngineConfig(max_batch_size=4))}, 4)`
    """
    if num_runs < 1:
        raise ConfigError(f"num_runs is {num_runs}; it must be at least 1")
    results = [Result(entrant.name, batch_size) for entrant in entrants]
    for entrant, result in zip(entrants, results, strict=True):
        result.warm_up_seconds = _warm_up(engines[entrant.model], entrant.requests)
    for _ in range(num_runs):
        for entrant, result in zip(entrants, results, strict=True):
            run = timed_run(engines[entrant.model], entrant.requests)
            result.runs.append(run)
            on_run(entrant.name, run)
    for entrant, result in zip(entrants, results, strict=True):
        if entrant.is_right is not None:
            answers = enumerate(result.runs[-1].token_ids)
            result.num_right = sum(entrant.is_right(index, ids) for index, ids in answers)
    return results


def _warm_up(engine: Engine, requests: Sequence[Request]) -> float:
    """Run until no new graph is captured; seconds."""
    start = time.perf_counter()
    for _ in range(MOST_WARM_UPS):
        known = engine.num_graphs
        engine.generate(requests)
        engine.forget_prompts()
        if engine.num_graphs == known:
            break
    return time.perf_counter() - start


def timed_run(engine: Engine, requests: Sequence[Request]) -> Run:
    """Answer all requests, with the clock on.

    Raises:
        RequestError: A request cannot be served.
    """
    engine.forget_prompts()
    before, graphs = engine.num_preemptions, engine.num_graphs
    with engine.timed() as clock:
        start = time.perf_counter()
        numbers = [engine.add(request) for request in requests]
        outputs: dict[int, Output] = {}
        while len(outputs) < len(numbers):
            for output in engine.step():
                if output.error is not None:
                    raise output.error
                outputs[output.request_id] = output
        seconds = time.perf_counter() - start
        steps = clock.times()
    lengths = {number: len(outputs[number].token_ids) for number in numbers}
    tokens, spent = _decode_only(steps, lengths)
    ordered = [outputs[number].result for number in numbers]
    results = [result for result in ordered if result is not None]
    return Run(
        token_ids=[result.token_ids for result in results],
        num_forwards=sum(result.num_forwards for result in results),
        num_query_tokens=sum(result.num_query_tokens for result in results),
        seconds=seconds,
        decode_tokens=tokens,
        decode_seconds=spent,
        steps_ms=step_periods(steps),
        num_preemptions=engine.num_preemptions - before,
        num_captured=max(engine.num_graphs - graphs, 0),
        accepted=[
            [len(step.accepted[number]) for step in steps if number in step.accepted]
            for number in numbers
        ],
        forwards=[result.num_forwards for result in results],
        query_tokens=[result.num_query_tokens for result in results],
        decoded_tokens=[result.num_decoded_tokens for result in results],
    )


def step_periods(steps: Sequence[StepTime]) -> list[float]:
    """Milliseconds from the end of each step to the end of the next one."""
    return [1000 * (other.end - one.end) for one, other in itertools.pairwise(steps)]


def _decode_only(steps: Sequence[StepTime], lengths: Mapping[int, int]) -> tuple[int, float]:
    tokens, seconds = 0, 0.0
    for one, step in zip([None, *steps], steps, strict=False):
        if step.shape.prefill:
            continue
        seconds += step.end - (step.begin if one is None else one.end)
        tokens += sum(
            index < lengths[number]
            for number, indices in step.accepted.items()
            for index in indices
        )
    return tokens, seconds


def acceptance_trace(run: Run) -> list[int]:
    """How many tokens a request's first, second, … forward fills on average, rounded, at least 1.

    It ends where fewer than half of the requests go on.

    Example:
        `EngineConfig(imposed_acceptance=tuple(acceptance_trace(run)))` accepts alike.
    """
    trace: list[int] = []
    while True:
        reached = [a[len(trace)] for a in run.accepted if len(a) > len(trace)]
        if not reached or 2 * len(reached) < len(run.accepted):
            return trace
        trace.append(max(1, round(sum(reached) / len(reached))))


def speed_ratios(
    rows: Sequence[Mapping[str, Any]], fast: str = "pipelined", slow: str = "autoregressive"
) -> dict[str, Any]:
    """Per batch size, tokens/s of one entrant / those of another; and where the other overtakes.

    `overtaken_at` is the smallest batch size from which on the ratio stays below 1, None if there
    is none among those measured.

    Args:
        rows: Summaries of `Result`.
        fast: Name of the one.
        slow: Name of the other.

    Example:
        >>> speed = {"tokens_per_second": {"median": 1.0}, "decode_tokens_per_second": None}
        >>> speed_ratios([speed | {"name": "pipelined", "batch_size": 1}])["by_batch_size"]
        []
    """
    table = []
    for batch_size in dict.fromkeys(row["batch_size"] for row in rows):
        of = {row["name"]: row for row in rows if row["batch_size"] == batch_size}
        if fast not in of or slow not in of:
            continue
        line: dict[str, Any] = {"batch_size": batch_size}
        for short, key in (
            ("end_to_end", "tokens_per_second"),
            ("decode_only", "decode_tokens_per_second"),
        ):
            one, other = of[fast][key], of[slow][key]
            line[short] = one["median"] / other["median"] if one and other else None
        table.append(line)
    overtaken: dict[str, int | None] = {"end_to_end": None, "decode_only": None}
    for kind in overtaken:
        for line in reversed(table):
            if line[kind] is None or line[kind] >= 1:
                break
            overtaken[kind] = line["batch_size"]
    return {"of": f"{fast} / {slow}", "by_batch_size": table, "overtaken_at": overtaken}
