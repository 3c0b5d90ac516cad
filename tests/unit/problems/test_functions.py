"""The functions to write: what the generator promises about splits, answers and hidden tests."""

from __future__ import annotations

import re
import subprocess
import sys
from ast import literal_eval
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from d2f.errors import ConfigError
from d2f.problems import SPLITS
from d2f.problems.functions import (
    OPERATIONS,
    FunctionConfig,
    FunctionProblem,
    generate_function_problem,
    generate_function_problems,
    program,
    split_of_operations,
)
from d2f.problems.functions.cases import run
from d2f.problems.functions.operation import Operation
from d2f.problems.functions.pipeline import Pipeline, Step
from d2f.text import Tokenizer
from d2f.training.tokenizer import train_tokenizer

TAGS = {(operation.takes, operation.tag): operation for operation in OPERATIONS.values()}
PINNED_PROMPT = (
    'Write a function char_count_sign(message) that takes the number of times "m" occ'
    'urs in message, then names the sign of the result by "plus" or "minus" or "zero"'
    ", then returns the result.\n"
    ">>> char_count_sign('river6')\n"
    "'zero'\n"
    ">>> char_count_sign('Cream MIA')\n"
    "'plus'"
)
PINNED_RESPONSE = (
    "def char_count_sign(message):\n"
    '    count = message.count("m")\n'
    '    word = "plus" if count > 0 else "minus" if count < 0 else "zero"\n'
    "    return word"
)


@pytest.fixture(scope="module")
def sample() -> list[FunctionProblem]:
    return list(generate_function_problems(3_000, seed=11))


def operations_of(problem: FunctionProblem) -> list[tuple[Operation, str]]:
    """The operations that a structure names, each with the kind of its argument."""
    kind, *parts = problem.structure.split(">")
    found = []
    for part in parts:
        tag, _, argument = part.removesuffix(")").partition("(")
        found.append((TAGS[kind, tag], argument))
        kind = found[-1][0].gives
    return found


def passes(problem: FunctionProblem, text: str) -> bool:
    try:
        exec(program(problem, text), {})
    except Exception:
        return False
    return True


def test_same_arguments_give_the_same_problem_in_any_order() -> None:
    forward = [generate_function_problem(3, index) for index in range(40)]
    backward = [generate_function_problem(3, index) for index in reversed(range(40))]
    assert forward == backward[::-1]
    assert list(generate_function_problems(10, seed=3, start=30)) == forward[30:]


def test_seed_and_split_change_the_problem() -> None:
    made = [generate_function_problem(seed, 0, split) for seed in range(20) for split in SPLITS]
    assert len({problem.prompt for problem in made}) == 60


def test_a_problem_is_pinned() -> None:
    """Trained models and their reports depend on the stream: change it knowingly."""
    problem = generate_function_problem(0, 1, "test")
    assert problem.prompt == PINNED_PROMPT
    assert problem.response == PINNED_RESPONSE


def test_the_stream_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "from d2f.problems.functions import generate_function_problems as g;"
        "print([(p.prompt, p.tests) for p in g(60, seed=1)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "src"},
            cwd=Path(__file__).parents[3],
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize("split", SPLITS)
def test_answers_pass_the_shown_and_the_hidden_calls(split: str) -> None:
    for problem in generate_function_problems(500, seed=21, split=split):
        space: dict[str, object] = {}
        exec(problem.response, space)
        assert problem.entry_point in space
        for line in (*problem.examples, *problem.tests):
            exec(line, space)
        exec(program(problem, problem.response), {})


def test_hidden_calls_are_others_than_the_shown(sample: list[FunctionProblem]) -> None:
    for problem in sample:
        assert 8 <= len(problem.tests) <= 10
        calls = [line.split(" == ")[0] for line in (*problem.examples, *problem.tests)]
        assert len(set(calls)) == len(calls)
        shown = re.findall(r"^>>> (.*)\n(.*)$", problem.prompt, re.MULTILINE)
        lines = tuple(f"assert repr({call}) == {result!r}" for call, result in shown)
        assert lines == problem.examples


def test_edges_are_tested(sample: list[FunctionProblem]) -> None:
    for kind, edge in (("ints", "[]"), ("strs", "[]"), ("str", "''"), ("int", "0")):
        problems = [p for p in sample if p.structure.startswith(f"{kind}>")]
        tested = sum(any(f"({edge}" in line for line in p.tests) for p in problems)
        assert tested > 0.6 * len(problems), kind


def test_values_stay_small(sample: list[FunctionProblem]) -> None:
    for problem in sample[:1_000]:
        for line in problem.tests:
            call, result = re.findall(r"^assert repr\(\w+\((.*)\)\) == (.*)$", line)[0]
            for value in (*literal_eval(f"({call},)"), literal_eval(literal_eval(result))):
                numbers = value if isinstance(value, list) else [value]
                assert len(numbers) <= 12
                assert all(
                    len(part) <= 40 if isinstance(part, str) else abs(part) < 10_000
                    for part in numbers
                )


def test_steps_are_uniform_over_the_range(sample: list[FunctionProblem]) -> None:
    counts = Counter(problem.num_steps for problem in sample)
    assert set(counts) == {1, 2, 3, 4}
    assert max(counts.values()) < 1.2 * min(counts.values())
    assert all(p.num_steps == p.structure.count(">") for p in sample)


def test_splits_share_no_structure_nor_its_operations_in_another_order(
    sample: list[FunctionProblem],
) -> None:
    seen = {}
    for split in ("train", "validation", "test"):
        problems = (
            sample
            if split == "train"
            else list(generate_function_problems(400, seed=5, split=split))
        )
        found = {frozenset(op.id for op, _ in operations_of(p)) for p in problems}
        assert all(split_of_operations([OPERATIONS[i] for i in ids]) == split for ids in found)
        seen[split] = ({problem.structure for problem in problems}, found)
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        for mine, theirs in zip(seen[one], seen[other], strict=True):
            assert not mine & theirs
    assert len(seen["test"][0]) > 250


def test_training_shows_every_operation_but_not_in_every_company() -> None:
    seen: set[str] = set()
    index = 0
    while len(seen) < len(OPERATIONS) and index < 12_000:
        problem = generate_function_problem(2, index)
        seen.update(operation.id for operation, _ in operations_of(problem))
        index += 1
    assert seen == set(OPERATIONS)


def test_structures_name_no_constant(sample: list[FunctionProblem]) -> None:
    for problem in sample:
        for operation, argument in operations_of(problem):
            allowed = {""} if operation.argument is None else {"#", operation.argument.kind}
            assert argument in allowed


def template(problem: FunctionProblem) -> str:
    """The prompt's sentence without the names and constants of the problem."""
    kinds = [problem.structure.split(">")[0], *re.findall(r"\((\w+)\)", problem.structure)]
    names = re.findall(r"\w+", problem.response.split("\n")[0])[2:]
    text = problem.prompt.split("\n")[0]
    text = re.sub(r"^(Write (?:a function )?)\w+\([^)]*\)", r"\1", text)
    for i, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        text = re.sub(rf"\b{name}\b", f"<{kind}{i}>", text)
    return " ".join(kinds) + ": " + re.sub(r"-?\d+|\"[aeiostrnlcm]\"", "#", text)


def test_the_sentence_determines_the_function(sample: list[FunctionProblem]) -> None:
    short = generate_function_problems(4_000, seed=8, config=FunctionConfig(max_steps=2))
    seen: dict[str, str] = {}
    for problem in (*sample, *short):
        assert seen.setdefault(template(problem), problem.structure) == problem.structure


def test_hidden_tests_tell_a_function_from_its_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps dropped, steps swapped for others, constants off by one: 97% must fail."""
    from d2f.problems.functions import generator

    pipelines: list[Pipeline] = []
    make = generator.sample_pipeline

    def remember(*arguments: object) -> Pipeline | None:
        pipelines.append(make(*arguments))  # type: ignore[arg-type]
        return pipelines[-1]

    monkeypatch.setattr(generator, "sample_pipeline", remember)
    tried, survived = Counter[str](), Counter[str]()
    rng = Random(1)
    for problem in generate_function_problems(300, seed=31, split="test"):
        pipeline = pipelines[-1]
        assert pipeline.source() == problem.response
        calls = [re.match(r"assert repr\(\w+\((.*)\)\) == (.*)$", t) for t in problem.tests]
        for kind, steps in mutants(pipeline, rng):
            rival = Pipeline(steps, pipeline.name, pipeline.parameters)
            tried[kind] += 1
            for call in calls:
                assert call is not None
                # Small values only: a rival may ask for the factorial of a product.
                case = run(rival, list(literal_eval(f"({call[1]},)")))
                if case is None or repr(case[1][-1]) != literal_eval(call[2]):
                    break
            else:
                survived[kind] += 1
    assert set(tried) == {"dropped", "swapped", "off by one"}
    for kind, count in tried.items():
        assert count > 200
        assert survived[kind] <= 0.03 * count, (kind, survived[kind], count)


def mutants(pipeline: Pipeline, rng: Random) -> list[tuple[str, list[Step]]]:
    """Functions that differ from the pipeline in one step."""
    found = []
    used = {step.operation.id for step in pipeline.steps}
    for i, step in enumerate(pipeline.steps):
        before, after = pipeline.steps[:i], pipeline.steps[i + 1 :]
        own = step.operation
        if own.takes == own.gives:
            found.append(("dropped", [*before, *after]))
        if isinstance(step.constant, int):
            found += [
                ("off by one", [*before, Step(own, step.constant + change), *after])
                for change in (-1, 1)
            ]
        others = [
            other
            for other in OPERATIONS.values()
            if (other.takes, other.gives) == (own.takes, own.gives)
            and other.id not in used
            and (other.argument is None or own.argument == other.argument)
        ]
        for other in rng.sample(others, min(3, len(others))):
            same = other.argument is not None
            swapped = Step(
                other,
                step.constant if same else None,
                step.parameter if same else "",
                step.index,
            )
            found.append(("swapped", [*before, swapped, *after]))
    return [(kind, steps) for kind, steps in found if steps]


DOUBLE = FunctionProblem(
    prompt="Write a function f(n) that doubles n.\n>>> f(2)\n4",
    response="def f(n):\n    return n * 2",
    examples=("assert repr(f(2)) == '4'",),
    tests=("assert repr(f(5)) == '10'", "assert repr(f(0)) == '0'"),
    entry_point="f",
    structure="int>times(#)",
    num_steps=1,
)


@pytest.mark.parametrize(
    "text",
    [
        "def f(n):\n    return n + n",
        "f = lambda n: 2 * n",
        "from __future__ import annotations\ndef f(n: int) -> int:\n    return n << 1",
        "print('hello')\ndef f(n):\n    print(n)\n    return n * 2",
        "def f(n):\n    return g(n)\n\ndef g(n):\n    return n * 2\n\n"
        "if __name__ == '__main__':\n    raise ValueError",
        'def f(n):\n    """Double."""\n    return n * 2  # \'"""',
    ],
)
def test_any_right_program_passes(text: str) -> None:
    assert passes(DOUBLE, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "def f(n):\n    return n + 2",
        "def f(n):\n    return n * 2.0",
        "def f(n):\n    return str(n * 2)",
        "def f(n):\n    return bool(n)",
        "def f(n):\n    print(n * 2)",
        "def g(n):\n    return n * 2",
        "def f(n):\n    return n *",
        "raise SystemExit(0)",
        "def f(n):\n    raise SystemExit(0)",
        "import sys\nsys.exit()",
        "def f(n):\n    return 4",
        'def f(n):\n    return n * 2\n"""',
        "def f(n):\n    return n * 2\nif False:\n",
        "```python\ndef f(n):\n    return n * 2\n```",
    ],
)
def test_a_wrong_program_raises(text: str) -> None:
    assert not passes(DOUBLE, text)


def test_texts_are_short_and_survive_a_tokenizer(
    sample: list[FunctionProblem], tmp_path: Path
) -> None:
    texts = [text for problem in sample for text in (problem.prompt, problem.response)]
    tokenizer = Tokenizer.load(train_tokenizer(texts, tmp_path, vocab_size=2048))
    problems = list(generate_function_problems(500, seed=6, split="test"))
    prompts = [tokenizer.encode(problem.prompt) for problem in problems]
    responses = [tokenizer.encode(problem.response) for problem in problems]
    assert [tokenizer.decode(ids) for ids in prompts] == [p.prompt for p in problems]
    assert [tokenizer.decode(ids) for ids in responses] == [p.response for p in problems]
    for lengths, mean in ((map(len, prompts), 80), (map(len, responses), 45)):
        found = sorted(lengths)
        assert sum(found) < mean * len(found)
        assert found[int(0.95 * len(found))] <= 115


def test_the_code_is_plain(sample: list[FunctionProblem]) -> None:
    for problem in sample:
        first, *body, last = problem.response.split("\n")
        assert re.fullmatch(rf"def {problem.entry_point}\(\w+(, \w+){{0,2}}\):", first)
        assert re.fullmatch(r"    return \w+", last)
        assert all(re.match(r"(    ){1,3}\S", line) for line in body)
        assert "{" not in problem.prompt + problem.response.replace("f{", "")
        assert len(problem.prompt) <= 300


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_steps": 0}, "min_steps"),
        ({"min_steps": 3, "max_steps": 2}, "3 and 2"),
        ({"max_steps": 5}, "max_steps <= 4"),
        ({"num_examples": 0}, "num_examples must be in 1 … 3, got 0"),
        ({"num_tests": 11}, "num_tests must be in 6 … 10, got 11"),
        ({"parameter_rate": 1.5}, "parameter_rate must be in 0 … 1, got 1.5"),
        ({"max_chars": 100}, "max_chars must be at least 200, got 100"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        FunctionConfig(**settings)  # type: ignore[arg-type]


def test_settings_are_kept_to() -> None:
    config = FunctionConfig(
        min_steps=2, max_steps=3, num_examples=3, num_tests=6, parameter_rate=0, max_chars=240
    )
    for problem in generate_function_problems(200, seed=9, split="test", config=config):
        assert problem.num_steps in (2, 3)
        assert problem.prompt.count("\n>>> ") == len(problem.examples) == 3
        assert 6 <= len(problem.tests) <= 8
        assert len(problem.prompt) <= 240
        for operation, argument in operations_of(problem):
            assert operation.argument is None or (
                argument == ("#" if operation.argument.can_be_constant else operation.argument.kind)
            )


def test_unknown_split_and_negative_index_are_refused() -> None:
    with pytest.raises(ValueError, match="split must be one of"):
        generate_function_problem(0, 0, "dev")
    with pytest.raises(ValueError, match="index must not be negative"):
        generate_function_problem(0, -1)
