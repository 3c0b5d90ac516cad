"""The formulas by hand."""

from __future__ import annotations

import math

import pytest

from d2f.evaluation.eval_score import summarise_score
from d2f.evaluation.eval_speed import summarise_speed
from d2f.evaluation.metrics import standard_error


def make_record(correct, tokens, forwards, queries, seconds, **others):
    return {
        "correct": correct,
        "num_tokens": tokens,
        "num_forwards": forwards,
        "num_query_tokens": queries,
        "seconds": seconds,
        "error": None,
        "metrics": {"exact": float(correct)},
    } | others


def test_a_score_by_hand():
    records = [
        make_record(True, 10, 2, 40, 0.5),
        make_record(False, 30, 10, 160, 1.5),
        make_record(False, 0, 0, 0, 9.0, error="too long", metrics={}),
    ]
    summary = summarise_score(records, batch_size=4)
    assert summary.pop("score") == pytest.approx(1 / 3)
    assert summary.pop("standard_error") == pytest.approx(math.sqrt(2 / 27))
    assert summary.pop("metrics") == {"exact": pytest.approx(1 / 3)}
    assert summary == {
        "num_problems": 3,
        "num_correct": 1,
        "batch_size": 4,
        "num_errors": 1,
        "num_forwards": 12,
        "tokens_per_second": 20,
        "tokens_per_forward": pytest.approx(40 / 12),
        "mean_of_tokens_per_forward": 4,
        "query_tokens_per_forward": pytest.approx(200 / 12),
        "computed_per_answered": 5,
        "milliseconds_per_forward": pytest.approx(2000 / 12),
        "seconds_per_problem": 1,
        "mean_tokens": 20,
        "correct": "100",
    }


def test_a_score_of_failures_alone_divides_by_nothing():
    summary = summarise_score(
        [make_record(False, 0, 0, 0, 1.0, error="x", metrics={})], batch_size=1
    )
    assert summary["score"] == 0
    assert summary["num_errors"] == 1
    assert math.isnan(summary["tokens_per_forward"])
    assert math.isnan(standard_error(math.nan, 0))


def make_line(number, index, tokens, seconds, decode=(0, 0.0), correct=True):
    return {
        "round": number,
        "index": index,
        "num_tokens": tokens,
        "num_forwards": 2,
        "num_query_tokens": 20,
        "seconds": seconds,
        "decode_tokens": decode[0],
        "decode_seconds": decode[1],
        "correct": correct,
    }


def test_a_speed_by_hand():
    lines = [
        make_line(number, index, tokens, seconds * (number + 1), (5, 0.25 * (number + 1)))
        for number in range(3)
        for index, (tokens, seconds) in enumerate([(8, 0.5), (4, 1.5)])
    ]
    summary = summarise_speed(lines, batch_size=1)
    assert summary == {
        "num_problems": 2,
        "num_runs": 3,
        "batch_size": 1,
        "tokens_per_second": {"median": 3, "lowest": 2, "highest": 6},
        "decode_tokens_per_second": {
            "median": 10,
            "lowest": pytest.approx(10 / 1.5),
            "highest": 20,
        },
        "seconds_per_problem": {"median": 2, "lowest": 1, "highest": 3},
        "milliseconds_per_forward": 1000,
        "tokens_per_forward": 3,
        "mean_of_tokens_per_forward": 3,
        "query_tokens_per_forward": 10,
        "computed_per_answered": pytest.approx(120 / 36),
        "mean_tokens": 6,
        "score": 1,
    }


def test_a_speed_without_decode_steps_and_none_at_all():
    assert (
        summarise_speed([make_line(0, 0, 8, 1.0)], batch_size=1)["decode_tokens_per_second"] is None
    )
    assert summarise_speed([], batch_size=1) is None
