"""Scores on the built-in problems, many at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from d2f.engine.engine import Engine
from d2f.engine.request import Request
from d2f.evaluation.race import Answer, Row
from d2f.problems import Problem, extract_answer
from d2f.text import Tokenizer


def score_problems(
    name: str,
    engine: Engine,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    make_request: Callable[[list[int]], Request],
) -> Row:
    """Answer all problems in the engine's batches.

    The seconds of an answer are the whole run's, shared out evenly: a throughput, not a latency.

    Args:
        name: Of the row.
        engine: Its `max_batch_size` sets the batch.
        tokenizer: The model's.
        problems: What to answer.
        make_request: Turns prompt ids into a request.

    Example:
        `score_problems("serial", engine, tokenizer, problems,
        lambda ids: Request(prompt_ids=ids, strategy="serial"))`
    """
    prompts = [tokenizer.encode_prompt(problem.prompt) for problem in problems]
    start = time.perf_counter()
    results = engine.generate([make_request(prompt) for prompt in prompts])
    seconds = (time.perf_counter() - start) / len(problems)
    return Row(
        name,
        [
            Answer(
                correct=extract_answer(tokenizer.decode(result.token_ids)) == problem.answer,
                num_tokens=len(result.token_ids),
                num_forwards=result.num_forwards,
                num_query_tokens=result.num_query_tokens,
                seconds=seconds,
            )
            for problem, result in zip(problems, results, strict=True)
        ],
    )
