"""Strategies side by side on the same problems: score, speed, and what makes the difference.

All runs take the problems in turn (problem 1 with every strategy, problem 2 with every strategy,
…), so that a disturbance of the machine hits them alike. One problem at a time, batch size 1; the
clock covers the engine's whole call, prompt included, and nothing of the tokenizer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from d2f.engine.engine import Engine
from d2f.engine.request import Request
from d2f.errors import ConfigError, counted
from d2f.evaluation.metrics import answer_metrics, mean_and_error, ratio, standard_error
from d2f.problems import Problem, extract_answer
from d2f.text import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Runner:
    """One row of a race: an engine and how it is asked."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    strategy: str
    options: Mapping[str, Any] = field(default_factory=dict)
    early_stop: bool = True
    num_problems: int
    """The first so many problems; slow methods take fewer."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One problem answered."""

    correct: bool
    num_tokens: int
    num_forwards: int
    num_query_tokens: int
    seconds: float


@dataclass
class Row:
    """The answers of one runner and what follows from them."""

    name: str
    answers: list[Answer] = field(default_factory=list)

    @property
    def score(self) -> float:
        """Share of right answers."""
        return ratio(sum(answer.correct for answer in self.answers), len(self.answers))

    def summary(self) -> dict[str, Any]:
        """The columns of the contract, and what explains them."""
        count = len(self.answers)
        return {
            "name": self.name,
            "num_problems": count,
            "score": self.score,
            "score_standard_error": standard_error(self.score, count),
            **answer_metrics(self.answers),
        }


def paired_difference(one: Row, other: Row) -> tuple[float, float]:
    """Score of `one` minus score of `other` on their common problems, and its standard error.

    Example:
        >>> paired_difference(Row("a"), Row("b"))
        (0.0, 0.0)
    """
    gaps = [
        int(a.correct) - int(b.correct) for a, b in zip(one.answers, other.answers, strict=False)
    ]
    if len(gaps) < 2:
        return float(sum(gaps)), 0.0
    return mean_and_error(gaps)


def response_limit(problems: Sequence[Problem], tokenizer: Tokenizer, block_size: int) -> int:
    """Tokens of the longest worked answer and its EOS, rounded up to a block.

    Example:
        Every strategy of a race gets this as `max_new_tokens`.
    """
    return gold_limit([problem.response for problem in problems], tokenizer, block_size)


def gold_limit(responses: Sequence[str], tokenizer: Tokenizer, block_size: int) -> int:
    """Tokens of the longest of these answers and its EOS, rounded up to a block."""
    longest = max(len(tokenizer.encode(response)) + 1 for response in responses)
    return math.ceil(longest / block_size) * block_size


def run_race(
    runners: Sequence[Runner],
    problems: Sequence[Problem],
    *,
    max_new_tokens: int,
    on_answer: Callable[[str, Answer], None] = lambda name, answer: None,
) -> list[Row]:
    """Answer the problems with every runner; each runs once unclocked before.

    Raises:
        ConfigError: A runner asks for more problems than there are, or for none.
    """
    for runner in runners:
        if not 1 <= runner.num_problems <= len(problems):
            raise ConfigError(
                f"{runner.name} is to answer {counted(runner.num_problems, 'problem')}, "
                f"but there are {len(problems)}"
            )
        answer_problem(runner, problems[0], max_new_tokens=max_new_tokens)
    rows = {runner.name: Row(runner.name) for runner in runners}
    for index, problem in enumerate(problems):
        for runner in runners:
            if index < runner.num_problems:
                answer = answer_problem(runner, problem, max_new_tokens=max_new_tokens)
                rows[runner.name].answers.append(answer)
                on_answer(runner.name, answer)
    return list(rows.values())


def answer_problem(runner: Runner, problem: Problem, *, max_new_tokens: int) -> Answer:
    """One problem, clocked from token ids to token ids."""
    prompt = runner.tokenizer.encode_prompt(problem.prompt)
    request = Request(
        prompt_ids=prompt,
        max_new_tokens=max_new_tokens,
        strategy=runner.strategy,
        options=runner.options,
        early_stop=runner.early_stop,
    )
    # The same problem was answered before, at least by the unclocked run.
    runner.engine.forget_prompts()
    start = time.perf_counter()
    [result] = runner.engine.generate([request])
    seconds = time.perf_counter() - start
    return Answer(
        correct=extract_answer(runner.tokenizer.decode(result.token_ids)) == problem.answer,
        num_tokens=len(result.token_ids),
        num_forwards=result.num_forwards,
        num_query_tokens=result.num_query_tokens,
        seconds=seconds,
    )
