"""The race's arithmetic, by hand and on tiny models."""

from __future__ import annotations

import math

import pytest
from benchmarks.shipped_models import score_problems

from d2f.engine.engine import Engine, EngineConfig
from d2f.engine.request import Request
from d2f.errors import ConfigError
from d2f.evaluation.race import Entrant, Tally, gold_limit, paired_difference, race_by_problem
from d2f.problems import Problem
from d2f.testing import tiny_model, write_tokenizer
from d2f.text import Tokenizer

COLUMNS = [
    "name", "num_problems", "score", "tokens_per_second", "tokens_per_forward",
    "query_tokens_per_forward", "seconds_per_problem", "mean_tokens",
]  # fmt: skip


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer.load(write_tokenizer(tmp_path))


def make_problem(prompt, response="#### 7"):
    return Problem(prompt=prompt, response=response, answer=7, num_steps=1, structure="x")


PROBLEMS = [make_problem("1+6="), make_problem("What is 3 and 4?"), make_problem("7")]


def line(right, num_tokens=10, num_forwards=2, num_query_tokens=40, seconds=0.5):
    return {
        "num_tokens": num_tokens,
        "num_forwards": num_forwards,
        "num_query_tokens": num_query_tokens,
        "seconds": seconds,
        "correct": bool(right),
    }


def tally(*rights):
    return Tally("x", [line(right) for right in rights])


def test_summary_by_hand():
    slow = line(False, num_tokens=30, num_forwards=10, num_query_tokens=160, seconds=1.5)
    found = Tally("x", [line(True), slow])
    summary = found.summary()
    expected = {
        "name": "x",
        "num_problems": 2,
        "score": 0.5,
        "score_standard_error": math.sqrt(0.25 / 2),
        "tokens_per_second": 20,
        "tokens_per_forward": 40 / 12,
        "mean_of_tokens_per_forward": (5 + 3) / 2,
        "query_tokens_per_forward": 200 / 12,
        "computed_per_answered": 5,
        "milliseconds_per_forward": 2000 / 12,
        "seconds_per_problem": 1,
        "mean_tokens": 20,
    }
    assert summary == pytest.approx(expected)
    assert [name for name in summary if name in COLUMNS] == COLUMNS


def test_paired_difference_by_hand():
    gap, error = paired_difference(tally(1, 1, 0, 1), tally(1, 0, 0, 0))
    assert gap == 0.5
    # Gaps 0, 1, 0, 1 around 0.5: variance 1/3, over 4 problems.
    assert error == pytest.approx(math.sqrt(1 / 3 / 4))
    # Common problems only.
    assert paired_difference(tally(1, 1, 0, 1), tally(1, 0)) == pytest.approx((0.5, 0.5))
    assert paired_difference(tally(1), tally(0)) == (1.0, 0.0)
    assert paired_difference(tally(0, 1), tally(0, 1)) == (0.0, 0.0)


def test_limit_of_gold_answers_counts_eos_and_rounds_up(tokenizer):
    # One token per character: 7 and an EOS.
    responses = ["#### 17", "#### 7"]
    assert gold_limit(responses, tokenizer, 8) == 8
    assert gold_limit(responses, tokenizer, 7) == 14
    assert gold_limit(responses, tokenizer, 32) == 32


def make_entrant(tokenizer, name, count, strategy="pipelined", model="llada"):
    prompts = [tokenizer.encode_prompt(problem.prompt) for problem in PROBLEMS[:count]]
    return Entrant(
        name=name,
        engine=Engine(tiny_model(model)),
        requests=[Request(prompt_ids=p, max_new_tokens=9, strategy=strategy) for p in prompts],
        is_right=lambda index, ids: index == 1,
    )


def test_race_takes_the_problems_in_turn(tokenizer):
    entrants = [
        make_entrant(tokenizer, "ar", 3, "autoregressive", "qwen2"),
        make_entrant(tokenizer, "slow", 1, "vanilla"),
        make_entrant(tokenizer, "fast", 2),
    ]
    seen = []
    rows = race_by_problem(entrants, on_answer=lambda *told: seen.append(told))
    assert seen == [
        ("ar", False), ("slow", False), ("fast", False), ("ar", True), ("fast", True),
        ("ar", False),
    ]  # fmt: skip
    assert [row.correct for row in rows] == [[False, True, False], [False], [False, True]]
    assert rows[0].summary()["score"] == pytest.approx(1 / 3)
    for found in (found for row in rows for found in row.lines):
        assert 1 <= found["num_tokens"] <= 9
        assert found["seconds"] > 0
    assert rows[0].summary()["tokens_per_forward"] == 1
    for found, problem in zip(rows[0].lines, PROBLEMS, strict=True):
        assert found["num_query_tokens"] == len(problem.prompt) + found["num_tokens"] - 1


def test_race_refuses_an_entrant_without_problems(tokenizer):
    with pytest.raises(ConfigError, match="x has no problems"):
        race_by_problem([make_entrant(tokenizer, "x", 0)])


def test_scores_do_not_depend_on_the_batch(tokenizer):
    problems = [make_problem(f"{n}+{n}=" * (n + 1)) for n in range(5)]

    def score(batch_size):
        engine = Engine(tiny_model("Dream"), EngineConfig(max_batch_size=batch_size))
        row = score_problems(
            "x", engine, tokenizer, problems, lambda ids: Request(prompt_ids=ids, max_new_tokens=12)
        )
        return row

    alone, batched = score(1), score(4)
    assert len(alone.lines) == 5
    assert alone.correct == batched.correct
    for one, other in zip(alone.lines, batched.lines, strict=True):
        for name in ("num_tokens", "num_forwards", "num_query_tokens"):
            assert one[name] == other[name]
    # The clock is shared out evenly.
    assert len({found["seconds"] for found in batched.lines}) == 1


def test_right_answers_are_recognised(tokenizer):
    """A stand-in engine that writes the worked answer of every other problem."""

    class Known(Engine):
        texts = iter(["1 + 6 = 7\n#### 7", "#### 8", "7"])

        def step(self):
            outputs = super().step()
            for output in sorted(outputs, key=lambda output: output.request_id):
                output.result.token_ids[:] = tokenizer.encode(next(self.texts))
            return outputs

    row = score_problems(
        "x", Known(tiny_model("llada")), tokenizer, PROBLEMS, lambda ids: Request(prompt_ids=ids)
    )
    assert row.correct == [True, False, False]
    assert row.summary()["score"] == pytest.approx(1 / 3)
