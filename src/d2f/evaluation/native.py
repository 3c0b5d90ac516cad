"""Tasks whose problems the package generates: there is nothing to download."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from d2f.errors import ConfigError
from d2f.evaluation.code_answer import read_answer
from d2f.evaluation.sandbox import run_programs
from d2f.evaluation.task import Example, Task, Verdict, one_by_one
from d2f.problems import Problem, extract_answer, generate_problems
from d2f.problems.functions import FunctionProblem, generate_function_problems, program

NATIVE_TASKS = ("word-problems", "functions")
DEFAULT_NUM_EXAMPLES = 1000
MOST_EXAMPLES = 1_000_000
"""Most examples of a native task: all are made before the first is put to a model."""


def load_native_task(
    name: str, *, num_examples: int | None = None, seed: int = 0, split: str = "test"
) -> Task:
    """Generate a native task's problems.

    The answer to a word problem is correct if it ends with `####` and the right number.

    "validation" has problems of other structures than "test"; arguments as in `load_task`.

    Raises:
        ConfigError: More problems than anyone waits for.

    Example:
        >>> load_native_task("word-problems", num_examples=2).examples()[1].id
        'test-0-1'
    """
    count = DEFAULT_NUM_EXAMPLES if num_examples is None else num_examples
    if count > MOST_EXAMPLES:
        raise ConfigError(f"num_problems is {count}; task {name} makes at most {MOST_EXAMPLES}")
    if name == "functions":
        return functions_task(count, seed=seed, split=split)
    problems = _examples(generate_problems(count, seed=seed, split=split), seed, split)
    return Task(name=name, problems=problems, mark=one_by_one(_compare))


def functions_task(
    count: int,
    *,
    seed: int = 0,
    split: str = "test",
    execute: Callable[[Sequence[str]], Sequence[Any]] = run_programs,
) -> Task:
    """Generate Python functions to write; an answer that passes hidden tests is correct.

    `execute` runs the answers with their tests.
    """

    def mark(examples: Sequence[Example], texts: Sequence[str]) -> list[Verdict]:
        programs = [
            program(example.source, read_answer(text, [example.source.entry_point]))
            for example, text in zip(examples, texts, strict=True)
        ]
        return [
            Verdict(
                correct=bool(result.passed),
                answer=text,
                reason=None if result.passed else str(result.reason),
                metrics={"pass@1": float(result.passed)},
            )
            for text, result in zip(texts, execute(programs), strict=True)
        ]

    problems = generate_function_problems(count, seed=seed, split=split)
    return Task(name="functions", problems=_examples(problems, seed, split), mark=mark)


def _examples(
    problems: Iterable[Problem | FunctionProblem], seed: int, split: str
) -> tuple[Example, ...]:
    return tuple(
        Example(
            id=f"{split}-{seed}-{number}",
            prompt=problem.prompt,
            response=problem.response,
            source=problem,
        )
        for number, problem in enumerate(problems)
    )


def _compare(example: Example, text: str) -> Verdict:
    answer, problem = extract_answer(text), example.source
    correct = answer == problem.answer
    reason = "no number after ####" if answer is None else f"the answer is {problem.answer}"
    return Verdict(
        correct=correct,
        answer=None if answer is None else str(answer),
        reason=None if correct else reason,
        metrics={"accuracy": float(correct)},
    )
