"""Measure strategies side by side on the same prompts, and summarise their answers.

The strategies take turns, so that a disturbance of the machine hits them alike: problem by problem
at batch size 1, or run by run, where a run hands all prompts to an engine at once. Whatever an
engine does once (compiling, capturing graphs) it does before, without a clock; no prompt is still
cached when the clock starts.

An answer is a line, as `speed.jsonl` has them: `index`, `num_tokens`, `num_decoded_tokens`,
`num_forwards`, `num_query_tokens`, `seconds`, `decode_tokens`, `decode_seconds`, and `correct`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from d2f.engine.engine import Engine
from d2f.engine.request import Request
from d2f.errors import ConfigError, RequestError
from d2f.evaluation.answering import Run, answer_all, timed_run, warm_up
from d2f.evaluation.metrics import (
    answer_metrics,
    mean_and_error,
    percentile,
    ratio,
    spread,
    standard_error,
)
from d2f.evaluation.results import Record
from d2f.text import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One strategy of a race."""

    name: str
    engine: Engine
    """Engine of the strategy; entrants may share one."""
    requests: Sequence[Request]
    """The same prompts in the same order for all entrants; slow ones may have fewer."""
    is_right: Callable[[int, Sequence[int]], bool] | None = None
    """Whether the answer to a request, by its number, is right; None: nobody can say."""


def take_turns(entrants: Sequence[Entrant], *, together: bool) -> Iterator[tuple[Entrant, Run]]:
    """Time each entrant's requests, all of them `together` or one at a time, in turns.

    One at a time, every entrant answers problem 1, then every one problem 2, and so on.

    Raises:
        RequestError: A request cannot be served.
    """
    most = max((len(entrant.requests) for entrant in entrants), default=0)
    parts = [slice(None)] if together else [slice(i, i + 1) for i in range(most)]
    for part in parts:
        for entrant in entrants:
            if requests := entrant.requests[part]:
                yield entrant, timed_run(entrant.engine, requests)


def lines_of(run: Run) -> list[Record]:
    """Make the line of each answer with its `token_ids`; each has an equal share of the time."""
    share = 1 / len(run.answers)
    return [
        {
            "num_tokens": answer.num_tokens,
            "num_decoded_tokens": answer.num_decoded_tokens,
            "num_forwards": answer.num_forwards,
            "num_query_tokens": answer.num_query_tokens,
            "seconds": run.seconds * share,
            "decode_tokens": run.decode_tokens * share,
            "decode_seconds": run.decode_seconds * share,
            "token_ids": answer.token_ids,
        }
        for answer in run.answers
    ]


def speed_summary(rounds: Sequence[Sequence[Record]]) -> Record:
    """Summarise the lines of several rounds: speeds with their spread, and what explains them."""
    runs = [answer_metrics(lines) for lines in rounds]
    metrics: Record = dict(answer_metrics([line for lines in rounds for line in lines]))
    decoded = [
        [sum(line[name] for line in lines) for name in ("decode_tokens", "decode_seconds")]
        for lines in rounds
    ]
    return metrics | {
        "tokens_per_second": spread(run["tokens_per_second"] for run in runs),
        "decode_tokens_per_second": spread(tokens / s for tokens, s in decoded if s > 0),
        "seconds_per_problem": spread(run["seconds_per_problem"] for run in runs),
        "milliseconds_per_forward": percentile([r["milliseconds_per_forward"] for r in runs], 50),
    }


def gold_limit(responses: Sequence[str], tokenizer: Tokenizer, block_size: int) -> int:
    """Count the tokens of the longest of these answers and its EOS, rounded up to a block."""
    longest = max(len(tokenizer.encode(response)) + 1 for response in responses)
    return math.ceil(longest / block_size) * block_size


# ---------------------------------------------------------------------------- problem by problem


@dataclass
class Tally:
    """The lines of an entrant's answers."""

    name: str
    lines: list[Record] = field(default_factory=list)

    @property
    def correct(self) -> list[bool]:
        """Whether each answer is right."""
        return [line["correct"] for line in self.lines]

    def summary(self) -> dict[str, Any]:
        """Give the columns of `d2f demo --json`: score, speed, and what explains them."""
        count = len(self.lines)
        score = ratio(sum(self.correct), count)
        return {
            "name": self.name,
            "num_problems": count,
            "score": score,
            "score_standard_error": standard_error(score, count),
            **answer_metrics(self.lines),
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
    tallies = {entrant.name: Tally(entrant.name) for entrant in entrants}
    for entrant, run in take_turns(entrants, together=False):
        lines = tallies[entrant.name].lines
        [line] = lines_of(run)
        right = entrant.is_right is not None and entrant.is_right(len(lines), line["token_ids"])
        lines.append(line | {"correct": right})
        on_answer(entrant.name, right)
    return list(tallies.values())


# ------------------------------------------------------------------------------------ run by run


def race_by_run(
    entrants: Sequence[Entrant],
    batch_size: int,
    *,
    num_runs: int = 3,
    on_run: Callable[[str, Run], None] = lambda name, run: None,
) -> list[dict[str, Any]]:
    """Let all entrants answer all their requests `num_runs` times, in turns; a row for each.

    Raises:
        ConfigError: `num_runs` is below 1.
        RequestError: A request cannot be served.
    """
    if num_runs < 1:
        raise ConfigError(f"num_runs is {num_runs}; it must be at least 1")
    seconds = {}
    for entrant in entrants:
        requests, start = entrant.requests, time.perf_counter()
        failed = warm_up(entrant.engine, range(len(requests)), requests.__getitem__)
        if failed:
            raise RequestError(next(iter(failed.values())))
        seconds[entrant.name] = time.perf_counter() - start
    runs: dict[str, list[Run]] = {entrant.name: [] for entrant in entrants}
    for _ in range(num_runs):
        for entrant, run in take_turns(entrants, together=True):
            runs[entrant.name].append(run)
            on_run(entrant.name, run)
    return [
        {
            "name": entrant.name,
            "batch_size": batch_size,
            **summarise_runs(runs[entrant.name], entrant.is_right),
            "warm_up_seconds": seconds[entrant.name],
        }
        for entrant in entrants
    ]


def summarise_runs(
    runs: Sequence[Run], is_right: Callable[[int, Sequence[int]], bool] | None = None
) -> dict[str, Any]:
    """Summarise runs of the same requests; the score is that of the last run.

    Speeds are medians over the runs, with both ends.
    """
    answers = runs[-1].answers
    speed = speed_summary([lines_of(run) for run in runs])
    steps = [ms for run in runs for ms in run.steps_ms]
    score = None
    if is_right is not None:
        right = sum(is_right(answer.index, answer.token_ids) for answer in answers)
        score = right / len(answers)
    return {
        "num_prompts": len(answers),
        "num_runs": len(runs),
        **speed,
        "milliseconds_per_step": percentile(
            [1000 * r.seconds / max(len(r.steps_ms), 1) for r in runs], 50
        ),
        "step_ms_p50": percentile(steps, 50),
        "step_ms_p99": percentile(steps, 99),
        "seconds_per_prompt": speed["seconds_per_problem"]["median"],
        "score": score,
        "score_standard_error": None if score is None else standard_error(score, len(answers)),
        "num_preemptions": runs[-1].num_preemptions,
        "num_graphs_captured_in_runs": sum(run.num_captured for run in runs),
    }


def acceptance_trace(run: Run) -> list[int]:
    """Average how many tokens a request's first, second, … forward fills, rounded, at least 1.

    It ends where fewer than half of the requests go on.
    """
    trace: list[int] = []
    while True:
        reached = [a[len(trace)] for a in run.accepted if len(a) > len(trace)]
        if not reached or 2 * len(reached) < len(run.accepted):
            return trace
        trace.append(max(1, round(sum(reached) / len(reached))))


def speed_ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Divide tokens/s of pipelined by those of autoregression, and say where that overtakes.

    `overtaken_at` is the smallest batch size from which on the ratio stays below 1, None if there
    is none among those measured.

    Example:
        >>> speed = {"tokens_per_second": {"median": 1.0}, "decode_tokens_per_second": None}
        >>> speed_ratios([speed | {"name": "pipelined", "batch_size": 1}])["by_batch_size"]
        []
    """
    keys = {"end_to_end": "tokens_per_second", "decode_only": "decode_tokens_per_second"}
    by_place = {(row["name"], row["batch_size"]): row for row in rows}
    table: list[dict[str, Any]] = []
    for size in dict.fromkeys(row["batch_size"] for row in rows):
        fast, slow = (by_place.get((name, size)) for name in ("pipelined", "autoregressive"))
        if fast is None or slow is None:
            continue
        table.append(
            {"batch_size": size}
            | {
                kind: fast[key]["median"] / slow[key]["median"] if fast[key] and slow[key] else None
                for kind, key in keys.items()
            }
        )
    overtaken: dict[str, int | None] = dict.fromkeys(keys)
    for kind in keys:
        for line in reversed(table):
            if line[kind] is None or line[kind] >= 1:
                break
            overtaken[kind] = line["batch_size"]
    return {
        "of": "pipelined / autoregressive",
        "by_batch_size": table,
        "overtaken_at": overtaken,
    }
