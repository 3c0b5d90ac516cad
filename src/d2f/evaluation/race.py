"""Race strategies on the same prompts: score, speed, and what makes the difference.

The strategies take turns, so that a disturbance of the machine hits them alike: problem by problem
at batch size 1 (`race_by_problem`), or run by run, where a run hands all prompts to an engine at
once (`race_by_run`). Whatever an engine does once (compiling, capturing graphs) it does before,
without a clock; no prompt is still cached when the clock starts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from d2f.engine.engine import Engine
from d2f.engine.request import Request
from d2f.errors import ConfigError, RequestError
from d2f.evaluation.answering import Answer, Run, answer_all, timed_run, warm_up
from d2f.evaluation.metrics import (
    Counts,
    answer_metrics,
    mean_and_error,
    percentile,
    ratio,
    spread,
    standard_error,
)
from d2f.text import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One strategy of a race."""

    name: str
    engine: Engine
    """Entrants may share one."""
    requests: Sequence[Request]
    """The same prompts in the same order for all entrants; slow ones may have fewer."""
    is_right: Callable[[int, Sequence[int]], bool] | None = None
    """Whether the answer to a request, by its number, is right."""

    def judge(self, index: int, answer: Answer) -> bool:
        """Say whether an answer is right; False where nobody can say."""
        return self.is_right is not None and self.is_right(index, answer.token_ids)


def gold_limit(responses: Sequence[str], tokenizer: Tokenizer, block_size: int) -> int:
    """Count the tokens of the longest of these answers and its EOS, rounded up to a block.

    Example:
        Every strategy of a race gets this as `max_new_tokens`.
    """
    longest = max(len(tokenizer.encode(response)) + 1 for response in responses)
    return math.ceil(longest / block_size) * block_size


# ---------------------------------------------------------------------------- problem by problem


@dataclass
class Tally:
    """What an entrant's answers count, problem by problem."""

    name: str
    counts: list[Counts] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)

    def add(self, answer: Answer, seconds: float, correct: bool) -> None:
        """Count one answer."""
        self.counts.append(
            Counts(
                num_tokens=answer.num_tokens,
                num_forwards=answer.num_forwards,
                num_query_tokens=answer.num_query_tokens,
                seconds=seconds,
            )
        )
        self.correct.append(correct)

    @property
    def score(self) -> float:
        """Share of right answers."""
        return ratio(sum(self.correct), len(self.correct))

    def summary(self) -> dict[str, Any]:
        """Give the columns of `d2f demo --json`: score, speed, and what explains them."""
        count = len(self.correct)
        return {
            "name": self.name,
            "num_problems": count,
            "score": self.score,
            "score_standard_error": standard_error(self.score, count),
            **answer_metrics(self.counts),
        }


def paired_difference(one: Tally, other: Tally) -> tuple[float, float]:
    """Take the score of `other` from that of `one` on their common problems, with its error.

    Example:
        >>> paired_difference(Tally("a"), Tally("b"))
        (0.0, 0.0)
    """
    gaps = [int(a) - int(b) for a, b in zip(one.correct, other.correct, strict=False)]
    if len(gaps) < 2:
        return float(sum(gaps)), 0.0
    return mean_and_error(gaps)


def race_by_problem(
    entrants: Sequence[Entrant],
    on_answer: Callable[[str, bool], None] = lambda name, correct: None,
) -> list[Tally]:
    """Let every entrant answer problem 1, then problem 2, and so on, one problem at a time.

    Each entrant runs once unclocked before.

    Raises:
        ConfigError: An entrant has no requests.
        RequestError: A request cannot be served.
    """
    for entrant in entrants:
        if not entrant.requests:
            raise ConfigError(f"{entrant.name} has no problems to answer")
        answer_all(entrant.engine, entrant.requests[:1])
    tallies = [Tally(entrant.name) for entrant in entrants]
    for index in range(max((len(entrant.requests) for entrant in entrants), default=0)):
        for entrant, tally in zip(entrants, tallies, strict=True):
            if index < len(entrant.requests):
                # The same problem was answered before, at least by the unclocked run.
                entrant.engine.forget_prompts()
                [answer], seconds = answer_all(entrant.engine, [entrant.requests[index]])
                correct = entrant.judge(index, answer)
                tally.add(answer, seconds, correct)
                on_answer(entrant.name, correct)
    return tallies


# ------------------------------------------------------------------------------------ run by run


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
        """Give the columns of the table; speeds are medians over the runs, with both ends."""
        runs, last = self.runs, self.runs[-1]
        tokens, count = last.num_tokens, len(last.answers)
        steps = [ms for run in runs for ms in run.steps_ms]
        score = None if self.num_right is None else self.num_right / count
        return {
            "name": self.name,
            "batch_size": self.batch_size,
            "num_prompts": count,
            "num_runs": len(runs),
            "tokens_per_second": spread([run.num_tokens / run.seconds for run in runs]),
            "decode_tokens_per_second": spread(
                [r.decode_tokens / r.decode_seconds for r in runs if r.decode_seconds > 0]
            ),
            "tokens_per_forward": tokens / last.num_forwards,
            "mean_of_tokens_per_forward": sum(
                answer.num_tokens / max(len(forwards), 1)
                for answer, forwards in zip(last.answers, last.accepted, strict=True)
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


def race_by_run(
    entrants: Sequence[Entrant],
    batch_size: int,
    *,
    num_runs: int = 3,
    on_run: Callable[[str, Run], None] = lambda name, run: None,
) -> list[Result]:
    """Let all entrants answer all their requests `num_runs` times, in turns.

    Raises:
        ConfigError: `num_runs` is below 1.
        RequestError: A request cannot be served.

    Example:
        `race_by_run([Entrant(name="serial", engine=engine, requests=requests)], 4)`
    """
    if num_runs < 1:
        raise ConfigError(f"num_runs is {num_runs}; it must be at least 1")
    results = [Result(entrant.name, batch_size) for entrant in entrants]
    for entrant, result in zip(entrants, results, strict=True):
        requests, start = entrant.requests, time.perf_counter()
        failed = warm_up(entrant.engine, range(len(requests)), requests.__getitem__)
        if failed:
            raise RequestError(next(iter(failed.values())))
        result.warm_up_seconds = time.perf_counter() - start
    for _ in range(num_runs):
        for entrant, result in zip(entrants, results, strict=True):
            run = timed_run(entrant.engine, entrant.requests)
            result.runs.append(run)
            on_run(entrant.name, run)
    for entrant, result in zip(entrants, results, strict=True):
        if entrant.is_right is not None:
            answers = result.runs[-1].answers
            result.num_right = sum(entrant.judge(answer.index, answer) for answer in answers)
    return results


def acceptance_trace(run: Run) -> list[int]:
    """Average how many tokens a request's first, second, … forward fills, rounded, at least 1.

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
    """Divide tokens/s of one entrant by those of another, and say where the other overtakes.

    `overtaken_at` is the smallest batch size from which on the ratio stays below 1, None if there
    is none among those measured.

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
