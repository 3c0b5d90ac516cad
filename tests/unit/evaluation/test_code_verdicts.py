"""Answers of known verdict are judged right, and no way of writing makes a wrong one right."""

import pytest
from tests.unit.evaluation.code_answers import CONTINUATIONS, PROBLEMS, TOTAL, WHOLE

from d2f.evaluation.code_answer import humaneval_program, mbpp_solution, read_answer
from d2f.evaluation.sandbox import Limits, run_programs

RIGHT = "    return sum(xs)\n"
GOOD, BAD = TOTAL.head + RIGHT, TOTAL.head + "    return 0\n"


def passed(programs):
    """Whether each passes in the sandbox; equal ones run once."""
    different = list(dict.fromkeys(programs))
    results = dict(zip(different, run_programs(different, Limits(seconds=20)), strict=True))
    return [results[program].passed for program in programs]


def judged(problem, texts):
    rest = problem.prompt, problem.test, problem.entry
    return passed([humaneval_program(rest[0], text, *rest[1:]) for text in texts])


def differing(names, found, expected):
    return [
        (name, verdict)
        for name, verdict, right in zip(names, found, expected, strict=True)
        if verdict != right
    ]


WAYS = {**{f"continued, {name}": way for name, way in CONTINUATIONS.items()}, **WHOLE}


@pytest.fixture(scope="module")
def verdicts():
    """Of each problem in each way with each body, all run together."""
    programs = {}
    for problem in PROBLEMS:
        bodies = {True: (problem.right, problem.wrong), False: (problem.wrong, problem.right)}
        for name, way in WAYS.items():
            for right, pair in bodies.items():
                rest = problem.test, problem.entry
                text = way(problem, *pair)
                programs[problem.entry, name, right] = humaneval_program(
                    problem.prompt, text, *rest
                )
    return dict(zip(programs, passed(programs.values()), strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_each_way_of_writing_has_its_bodys_verdict(verdicts, way):
    found = {key: verdict for key, verdict in verdicts.items() if key[1] == way}
    assert len(found) == 2 * len(PROBLEMS)
    assert found == {key: key[2] for key in found}


def test_the_answers_are_many_and_different():
    texts = {
        way(problem, *bodies)
        for problem in PROBLEMS
        for way in (*CONTINUATIONS.values(), *WHOLE.values())
        for bodies in ((problem.right, problem.wrong), (problem.wrong, problem.right))
    }
    assert len(texts) > 800


def test_without_a_prompt_too():
    """As answers to MBPP and to the package's own functions are."""
    names, programs = [], []
    for problem in PROBLEMS:
        if "encode" in problem.prompt:
            continue
        tests = f"{problem.test}\ncheck({problem.entry})"
        for name in ("python", "unfenced in prose", "usage first", "in two fences", "redefined"):
            for verdict in (True, False):
                bodies = problem.right, problem.wrong
                text = WHOLE[name](problem, *(bodies if verdict else bodies[::-1]))
                names.append((problem.entry, name, verdict))
                programs.append(f"{mbpp_solution(text, tests)}\n{tests}")
                assert mbpp_solution(text, tests) == read_answer(text, [problem.entry])
    assert differing(names, passed(programs), [verdict for *_, verdict in names]) == []
