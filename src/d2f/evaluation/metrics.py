"""The formulas of all measurements: what follows from answers, and statistics of numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

OF_TOKENS = (
    "tokens_per_second", "tokens_per_forward", "mean_of_tokens_per_forward",
    "computed_per_answered", "mean_tokens",
)  # fmt: skip
"""Metrics that depend on which tokens are counted."""
DECODED = "num_decoded_tokens"
"""Number of all tokens that a line decoded, the tail behind the answer among them."""


def answer_metrics(
    answers: Sequence[Mapping[str, Any]], tokens: str = "num_tokens"
) -> dict[str, float]:
    """Speed of several answers and what explains it; nan where there is nothing to divide by.

    - `tokens_per_second`: all tokens / all seconds
    - `tokens_per_forward`: all tokens / all forwards; beside it the mean of each answer's own ratio
    - `query_tokens_per_forward`: what a forward costs, where tokens per forward is what it brings
    - `computed_per_answered`: tokens computed / tokens answered
    - `milliseconds_per_forward`: in a batch, a forward's share of its step
    - `seconds_per_problem`, `mean_tokens`

    `answers` are lines of `problems.jsonl` or `speed.jsonl`, and `tokens` is the count that stands
    for an answer's tokens: those up to and with the first EOS, or `DECODED`.

    Example:
        >>> line = {"num_tokens": 10, "num_forwards": 2, "num_query_tokens": 40, "seconds": 0.5}
        >>> metrics = answer_metrics([line])
        >>> metrics["tokens_per_second"], metrics["tokens_per_forward"]
        (20.0, 5.0)
    """
    count = len(answers)
    names = (tokens, "num_forwards", "num_query_tokens", "seconds")
    answered, forwards, queries, seconds = (sum(a[name] for a in answers) for name in names)
    return {
        "tokens_per_second": ratio(answered, seconds),
        "tokens_per_forward": ratio(answered, forwards),
        "mean_of_tokens_per_forward": ratio(
            sum(ratio(answer[tokens], answer["num_forwards"]) for answer in answers), count
        ),
        "query_tokens_per_forward": ratio(queries, forwards),
        "computed_per_answered": ratio(queries, answered),
        "milliseconds_per_forward": ratio(1000 * seconds, forwards),
        "seconds_per_problem": ratio(seconds, count),
        "mean_tokens": ratio(answered, count),
    }


def ratio(part: float, whole: float) -> float:
    """`part / whole`, nan without a whole.

    Example:
        >>> ratio(1, 4), ratio(0, 0)
        (0.25, nan)
    """
    return part / whole if whole else math.nan


def standard_error(share: float, count: int) -> float:
    """Return the standard error of a share of `count` problems that are right or wrong.

    Example:
        >>> standard_error(0.5, 100)
        0.05
    """
    return math.sqrt(share * (1 - share) / count) if count else math.nan


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Median, lowest and highest of several runs; None of none.

    Example:
        >>> spread([3.0, 1.0, 2.0])
        {'median': 2.0, 'lowest': 1.0, 'highest': 3.0}
    """
    found = list(values)
    if not found:
        return None
    return {"median": percentile(found, 50), "lowest": min(found), "highest": max(found)}


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of the values do not exceed; nan of none.

    Example:
        >>> percentile([4.0, 1.0, 3.0, 2.0], 50), percentile([1.0, 2.0], 99)
        (2.0, 2.0)
    """
    if not values:
        return math.nan
    rank = math.ceil(percent / 100 * len(values))
    return sorted(values)[max(rank, 1) - 1]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, which is nan of a single value.

    Example:
        >>> mean_and_error([1, 3])
        (2.0, 1.0)
    """
    count = len(values)
    deviation = statistics.stdev(values) if count > 1 else math.nan
    return sum(values) / count, deviation / math.sqrt(count)
