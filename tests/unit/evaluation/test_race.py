"""The race's arithmetic, by hand and on tiny models."""

from __future__ import annotations

import math

import pytest

from d2f.engine.engine import Engine, EngineConfig
from d2f.engine.request import Request
from d2f.errors import ConfigError
from d2f.evaluation.race import Answer, Row, Runner, paired_difference, response_limit, run_race
from d2f.evaluation.score import score_problems
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


def make_answer(correct=True, num_tokens=10, num_forwards=2, num_query_tokens=40, seconds=0.5):
    return Answer(
        correct=correct,
        num_tokens=num_tokens,
        num_forwards=num_forwards,
        num_query_tokens=num_query_tokens,
        seconds=seconds,
    )


def test_summary_by_hand():
    slow = make_answer(False, num_tokens=30, num_forwards=10, num_query_tokens=160, seconds=1.5)
    summary = Row("x", [make_answer(), slow]).summary()
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
    def row(*right):
        return Row("x", [make_answer(bool(r)) for r in right])

    gap, error = paired_difference(row(1, 1, 0, 1), row(1, 0, 0, 0))
    assert gap == 0.5
    # Gaps 0, 1, 0, 1 around 0.5: variance 1/3, over 4 problems.
    assert error == pytest.approx(math.sqrt(1 / 3 / 4))
    # Common problems only.
    assert paired_difference(row(1, 1, 0, 1), row(1, 0)) == pytest.approx((0.5, 0.5))
    assert paired_difference(row(1), row(0)) == (1.0, 0.0)
    assert paired_difference(row(0, 1), row(0, 1)) == (0.0, 0.0)


def test_response_limit_counts_eos_and_rounds_up(tokenizer):
    # One token per character: 7 and an EOS.
    problems = [make_problem("x", "#### 17"), make_problem("y")]
    assert response_limit(problems, tokenizer, 8) == 8
    assert response_limit(problems, tokenizer, 7) == 14
    assert response_limit(problems, tokenizer, 32) == 32


def make_runner(tokenizer, name, num_problems, strategy="pipelined", model="llada"):
    return Runner(
        name=name,
        engine=Engine(tiny_model(model)),
        tokenizer=tokenizer,
        strategy=strategy,
        num_problems=num_problems,
    )


def test_race_takes_the_problems_in_turn(tokenizer):
    runners = [
        make_runner(tokenizer, "ar", 3, "autoregressive", "qwen2"),
        make_runner(tokenizer, "slow", 1, "vanilla"),
        make_runner(tokenizer, "fast", 2),
    ]
    seen = []
    rows = run_race(
        runners, PROBLEMS, max_new_tokens=9, on_answer=lambda name, answer: seen.append(name)
    )
    assert seen == ["ar", "slow", "fast", "ar", "fast", "ar"]
    assert [(row.name, len(row.answers)) for row in rows] == [("ar", 3), ("slow", 1), ("fast", 2)]
    for row in rows:
        for answer in row.answers:
            assert 1 <= answer.num_tokens <= 9
            assert answer.seconds > 0
    assert rows[0].summary()["tokens_per_forward"] == 1
    for answer, problem in zip(rows[0].answers, PROBLEMS, strict=True):
        assert answer.num_query_tokens == len(problem.prompt) + answer.num_tokens - 1


@pytest.mark.parametrize("count", [0, 4])
def test_race_refuses_a_wrong_number_of_problems(tokenizer, count):
    runner = make_runner(tokenizer, "x", count)
    with pytest.raises(ConfigError, match=f"x is to answer {count} problems, but there are 3"):
        run_race([runner], PROBLEMS, max_new_tokens=9)


def test_scores_do_not_depend_on_the_batch(tokenizer):
    problems = [make_problem(f"{n}+{n}=" * (n + 1)) for n in range(5)]

    def score(batch_size):
        engine = Engine(tiny_model("Dream"), EngineConfig(max_batch_size=batch_size))
        row = score_problems(
            "x", engine, tokenizer, problems, lambda ids: Request(prompt_ids=ids, max_new_tokens=12)
        )
        return row

    alone, batched = score(1), score(4)
    assert len(alone.answers) == 5
    for one, other in zip(alone.answers, batched.answers, strict=True):
        for name in ("correct", "num_tokens", "num_forwards", "num_query_tokens"):
            assert getattr(one, name) == getattr(other, name)
    # The clock is shared out evenly.
    assert len({answer.seconds for answer in batched.answers}) == 1


def test_right_answers_are_recognised(tokenizer):
    """A stand-in engine that writes the worked answer of every other problem."""

    class Known(Engine):
        def generate(self, requests):
            results = super().generate(requests)
            for result, text in zip(results, ["1 + 6 = 7\n#### 7", "#### 8", "7"], strict=True):
                result.token_ids[:] = tokenizer.encode(text)
            return results

    row = score_problems(
        "x", Known(tiny_model("llada")), tokenizer, PROBLEMS, lambda ids: Request(prompt_ids=ids)
    )
    assert [answer.correct for answer in row.answers] == [True, False, False]
    assert row.score == pytest.approx(1 / 3)
