"""Programs are found in answers of all kinds; no text is too odd."""

import ast

import pytest
from hypothesis import HealthCheck, given, settings
from tests.unit.evaluation.odd_texts import HARD_TEXTS, ODD_TEXTS

from d2f.evaluation.code_answer import humaneval_program, mbpp_solution, read_answer
from d2f.evaluation.sandbox import run_programs

PROMPT = '''from typing import List


def total(xs: List[int]) -> int:
    """Add up.
    >>> total([1, 2])
    3
    """
'''
TEST = "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n"
WHOLE = "def total(xs):\n    return sum(xs)\n"

ANSWERS = {
    "body": ("    return sum(xs)\n", True),
    "body, then prose": ("    return sum(xs)\n\nThis (simply adds.\n", True),
    "body, then a fence": ("    return sum(xs)\n```\nThis adds.\n", True),
    "body, then an example": ("\n    return sum(xs)\n\n\ndef main(:\n", True),
    "fenced": (f"Here:\n```python\n{WHOLE}```\nDone.", True),
    "fenced body": ("```python\n    return sum(xs)\n```", True),
    "fence not closed": (f"```python\n{WHOLE}", True),
    "fenced with a wrong test": (f"```python\n{WHOLE}assert total([1]) == 2\n```", True),
    "whole function": (WHOLE, True),
    "whole function, then prose": (WHOLE + "\nThis (simply adds.\n", True),
    "wrong body": ("    return 0\n", False),
    "wrong fenced": ("```python\ndef total(xs):\n    return 0\n```", False),
    "nothing": ("", False),
    "prose": ("I do not know.", False),
    "other name": ("```python\ndef add(xs):\n    return sum(xs)\n```", False),
    "exit": ("    raise SystemExit(0)\n", False),
}


def test_humaneval_programs_are_judged():
    programs = [humaneval_program(PROMPT, text, TEST, "total") for text, _ in ANSWERS.values()]
    verdicts = [execution.passed for execution in run_programs(programs)]
    assert dict(zip(ANSWERS, verdicts, strict=True)) == {
        name: right for name, (_, right) in ANSWERS.items()
    }


def test_humaneval_continuation_is_left_as_it_is():
    body = "    # add\n    return sum(xs)\nx = 1"
    assert humaneval_program(PROMPT, body, TEST, "total") == (
        f"{PROMPT}{body}\n{TEST}\ncheck(total)"
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ODD_TEXTS)
def test_no_text_raises(text):
    ast.parse(read_answer(text, ["f"]))
    assert isinstance(mbpp_solution(text, "assert f(1)", text), str)
    assert isinstance(humaneval_program(PROMPT, text, TEST, "total"), str)
    assert isinstance(humaneval_program(text, text, text, "f"), str)


@pytest.mark.parametrize("number", range(len(HARD_TEXTS)))
def test_hard_texts_take_no_time(number):
    assert isinstance(read_answer(HARD_TEXTS[number], ["f"]), str)
    assert isinstance(humaneval_program(PROMPT, HARD_TEXTS[number], TEST, "total"), str)
