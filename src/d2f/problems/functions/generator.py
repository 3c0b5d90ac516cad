"""Generate a function problem from a seed and an index: operations, names, wording, calls."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from d2f.problems.functions.cases import Case, CaseSource
from d2f.problems.functions.operation import Operation
from d2f.problems.functions.pipeline import Pipeline, sample_operations, sample_pipeline
from d2f.problems.functions.problem import FunctionConfig, FunctionProblem
from d2f.problems.functions.wording import describe
from d2f.problems.problem import problem_stream, split_of

_DEFAULT = FunctionConfig()
_ATTEMPTS = 4


def split_of_operations(operations: list[Operation]) -> str:
    """Return the split of a set of operations; order and arguments have no effect.

    Example:
        >>> from d2f.problems.functions import OPERATIONS
        >>> two = [OPERATIONS["str.upper"], OPERATIONS["str.reversed"]]
        >>> split_of_operations(two) == split_of_operations(two[::-1])
        True
    """
    return split_of(" ".join(sorted(operation.id for operation in operations)))


def _call(pipeline: Pipeline, case: Case) -> str:
    return f"{pipeline.name}({', '.join(map(repr, case[0]))})"


def _assertion(pipeline: Pipeline, case: Case) -> str:
    return f"assert repr({_call(pipeline, case)}) == {repr(case[1][-1])!r}"


def _write(rng: Random, pipeline: Pipeline, config: FunctionConfig) -> FunctionProblem | None:
    source = CaseSource(rng, pipeline)
    shown = source.shown(config.num_examples)
    if shown is None:
        return None
    examples = "".join(f"\n>>> {_call(pipeline, case)}\n{case[1][-1]!r}" for case in shown)
    prompt = describe(rng, pipeline) + examples
    hidden = None if len(prompt) > config.max_chars else source.hidden(config.num_tests)
    if hidden is None:
        return None
    return FunctionProblem(
        prompt=prompt,
        response=pipeline.source(),
        examples=tuple(_assertion(pipeline, case) for case in shown),
        tests=tuple(_assertion(pipeline, case) for case in hidden),
        entry_point=pipeline.name,
        structure=pipeline.structure,
        num_steps=len(pipeline.steps),
    )


def generate_function_problem(
    seed: int, index: int, split: str = "train", config: FunctionConfig = _DEFAULT
) -> FunctionProblem:
    """Return problem number `index` of a split, which depends on the arguments alone.

    The hash of its set of operations, whatever their order and arguments, assigns a problem to a
    split, so no two splits share a structure, whatever the seeds.

    Raises:
        ValueError: The split is unknown or the index negative.

    Example:
        >>> problem = generate_function_problem(0, 5, "test")
        >>> problem == generate_function_problem(0, 5, "test")
        True
        >>> problem.response.startswith(f"def {problem.entry_point}(")
        True
    """
    rng = problem_stream(seed, index, split)
    span = config.max_steps - config.min_steps + 1
    # Drawn once, so that the draws rejected below do not change the distribution of steps.
    num_steps = config.min_steps + int(rng.random() * span)
    while True:
        operations = sample_operations(rng, num_steps)
        if operations is None or split_of_operations(operations) != split:
            continue
        # Some operations are rejected for most constants and inputs: a single one, and questions,
        # most of which are answered by no. They get more attempts, so as not to become rare.
        demanding = num_steps == 1 or operations[-1].gives == "bool"
        for _ in range(_ATTEMPTS if demanding else 1):
            pipeline = sample_pipeline(rng, operations, config.parameter_rate)
            problem = None if pipeline is None else _write(rng, pipeline, config)
            if problem is not None:
                return problem


def generate_function_problems(
    count: int,
    *,
    seed: int,
    split: str = "train",
    config: FunctionConfig = _DEFAULT,
    start: int = 0,
) -> Iterator[FunctionProblem]:
    """Yield problems `start` to `start + count` of a split.

    Example:
        >>> [problem.num_steps <= 4 for problem in generate_function_problems(3, seed=0)]
        [True, True, True]
    """  # fmt: skip
    for index in range(start, start + count):
        yield generate_function_problem(seed, index, split, config)
