"""The worker that marks formulas, with scorers of our own that misbehave."""

from __future__ import annotations

import pytest

from d2f.errors import D2FError
from d2f.evaluation.harness_scoring import MathScorer

SCORER = """
import os, sys, time

print("noise")

def last_boxed_only_string(text):
    return text if "box" in text else None

def get_unnormalized_answer(text):
    return "[invalidanswer]"

def process_results(doc, results):
    [text] = results
    print("more noise")
    if text == "hang":
        while True:
            pass
    if text == "die":
        os._exit(3)
    if text == "eat":
        bytes(2**36)
    if text == "raise":
        raise ValueError("no formula")
    return {"exact_match": 0, "math_verify": int(text == doc["answer"])}
"""
ZEROS = {"math_verify,none": 0.0, "exact_match,none": 0.0}
DOC = {"problem": "?", "solution": "$\\boxed{2}$", "answer": "2"}


@pytest.fixture
def make_scorer(tmp_path):
    file = tmp_path / "scorer.py"
    file.write_text(SCORER)
    return lambda **settings: MathScorer(file, **{"num_workers": 1} | settings)


def test_one_bad_answer_costs_the_others_nothing(make_scorer):
    scorer = make_scorer(seconds=1.0)
    texts = ["2", "hang", "2", "die", "eat", "raise", "\ud800 box", "2"]
    verdicts = scorer(None, [DOC] * len(texts), texts)
    assert [verdict.correct for verdict in verdicts] == [text == "2" for text in texts]
    assert [verdict.reason for verdict in verdicts] == [
        None,
        "the scorer took more than 1 s",
        None,
        "the scorer died",
        "MemoryError: ",
        "ValueError: no formula",
        "another answer, or none that can be parsed",
        None,
    ]
    assert verdicts[0].metrics == ZEROS | {"math_verify,none": 1.0}
    assert all(verdict.metrics == ZEROS for verdict in verdicts[3:6])
    assert verdicts[6].answer == "\ud800 box"
    assert verdicts[0].answer is None


def test_workers_stay_and_end_with_their_owner(make_scorer):
    scorer = make_scorer(num_workers=2)
    verdicts = scorer(None, [DOC] * 51, ["2", "3", "2"] * 17)
    assert [verdict.correct for verdict in verdicts] == [True, False, True] * 17
    workers = [scorer._workers.get() for _ in range(2)]
    processes = [worker._process for worker in workers if worker._process is not None]
    for worker in workers:
        scorer._workers.put(worker)
    assert scorer(None, [DOC], ["2"])[0].correct
    assert all(process.poll() is None for process in processes)
    del scorer
    assert processes
    assert all(process.poll() is not None for process in processes)


def test_a_scorer_that_does_not_start_says_so(tmp_path):
    file = tmp_path / "scorer.py"
    file.write_text("raise SystemExit(1)")
    with pytest.raises(D2FError, match="does not start"):
        MathScorer(file, num_workers=1)(None, [DOC], ["2"])
