"""Programs are found in answers of all kinds; no text is too odd."""

import ast
import time
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2f.evaluation.code_answer import _longest_run, extract_code, humaneval_program, sanitize
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

FENCES = {
    "no fence": ("x = 1\n", "x = 1\n"),
    "python": ("Hi\n```python\nx = 1\n```\nBye", "x = 1\n"),
    "short name": ("```py\nx = 1\n```", "x = 1\n"),
    "version": ("```Python3\nx = 1\n```", "x = 1\n"),
    "not the first": ("```\nold\n```\nthen\n```python\nx = 1\n```", "x = 1\n"),
    "the first of two": ("```python\nx = 1\n```\nor\n```python\nx = 2\n```", "x = 1\n"),
    "other language": ("```text\nx = 1\n```", "x = 1\n"),
    "not closed": ("Hi\n```python\nx = 1\ny = 2", "x = 1\ny = 2"),
    "no name, not closed": ("Hi\n```\nx = 1\n", "x = 1\n"),
    "indented": (" ```python\n x = 1\n ```\n", " x = 1\n"),
    "in a line": ("```python x = 1```", ""),
    "fence in a string": ('```python\nx = "```"\ny = 2\n```', 'x = "```"\ny = 2\n'),
    "closed by the prompt's": ("    return 1\n```\n", "    return 1\n"),
    "closed in the line": ("```\nx = 1```", "x = 1"),
    "windows": ("```python\r\nx = 1\r\n```", "x = 1\r\n"),
    "empty": ("", ""),
    "only a fence": ("```python\n", ""),
}


@pytest.mark.parametrize("name", FENCES)
def test_extract_code(name):
    text, code = FENCES[name]
    assert extract_code(text) == code


def names_of(code: str) -> list[str]:
    """What a program defines at its top, in order."""
    names = []
    for node in ast.parse(code).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names.append(node.names[0].name)
        elif isinstance(node, ast.Assign):
            names.append(ast.unparse(node.targets[0]))
        else:
            names.append(node.name)
    return names


def test_sanitize_takes_the_longest_run_between_prose():
    text = f"Sure, here it is!\n\n{WHOLE}\nIt's (simple: it sums.\nx = 1"
    assert sanitize(text, "total") == WHOLE.strip()


def test_sanitize_keeps_what_the_function_leads_to():
    code = """
import math, os
from re import sub; import string

LIMIT: int = 7
other = 1
first, second = 1, 2

@decorate
@again(
    1)
def helper(x):
    return Box(x + LIMIT + first)

def decorate(f):
    return f

class Box:
    def __init__(self, x):
        pass

def unused():
    return helper(1)

def silent(x):
    print(x)

def total(xs):
    silent(xs)
    def inner():
        return helper(xs)
    return inner()

print(total([]))
LIMIT += 1
assert True
"""
    kept = sanitize(code, "total")
    names = ["math", "sub", "string", "LIMIT", "(first, second)", "helper", "decorate", "Box"]
    tree = ast.parse(kept.replace("LIMIT: int", "LIMIT"))
    assert names_of(ast.unparse(tree)) == [*names, "total"]
    assert "@decorate\n@again(\n    1)\ndef helper" in kept


def test_sanitize_prefers_the_first_that_returns():
    stub = 'def total(xs):\n    """Add up."""\n'
    again = "def total(xs):\n    return 1\n"
    assert sanitize(stub + WHOLE + again, "total") == WHOLE.strip()
    assert sanitize(stub, "total") == ""
    assert sanitize("import os\n" + WHOLE, "missing") == "import os"


def test_sanitize_counts_bytes_where_python_does():
    code = 'é = "ü"; b = "ö" + é\ndef total(xs): return b; ä = 1'
    assert sanitize(code, "total") == 'é = "ü"\nb = "ö" + é\ndef total(xs): return b; ä = 1'


def test_sanitize_cuts_an_unfinished_end():
    unfinished = "import os\n" + WHOLE + "def next(x):\n    y = (1,\n        2\n"
    assert sanitize(unfinished, "total") == "import os\n" + WHOLE.strip()
    assert sanitize(WHOLE + '"""never closed\nx = 1\n', "total") == WHOLE.strip()


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


PROGRAM_LINES = (
    'def f(x):|    return x|    y = (1,|  2)|x = [|]|"""doc|doc"""|\'\'\'|if x:|else:|    pass|'
    "try:|class A:|# c|Sure, here it is:|print(x)|@deco|        z = 1|import os|\\|a=1 \\|{|f'{x'|"
    "match x:|    case 1:|return|\t y|async def g():|    if z:|except E:|elif y:|1 2"
).split("|")
ODD_LINES = ["```", "```python", "\0", "\ud800", "\x0c", "\r", "é = 1; b = 2", "'\\d'", "\u2028"]
ODD_TEXTS = st.one_of(
    st.text(st.characters()),
    st.lists(st.sampled_from(PROGRAM_LINES + ODD_LINES), max_size=12).map("\n".join),
    st.text("()[]{}:'\"\\\n \tx=,`", max_size=60),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ODD_TEXTS)
def test_no_text_raises(text):
    extract_code(text)
    kept = sanitize(text, "f")
    ast.parse(kept)
    assert isinstance(humaneval_program(PROMPT, text, TEST, "total"), str)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(PROGRAM_LINES), max_size=9))
def test_longest_run_is_the_longest(lines):
    def size(run):
        return sum(bool(line.strip()) for line in run)

    def parses(run):
        try:
            ast.parse("\n".join(run))
        except SyntaxError:
            return False
        return True

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends = range(len(lines) + 1)
        runs = [lines[start:end] for start in ends for end in ends if parses(lines[start:end])]
    assert size(_longest_run(lines)) == max(map(size, runs))


@pytest.mark.parametrize(
    "text",
    [
        "(" * 50_000,
        ("(" * 190 + ")") * 190,
        "-" * 90_000 + "1",
        "a" + ".b" * 40_000,
        "1+" * 40_000 + "1",
        "a=" * 30_000 + "1",
        "lambda:" * 10_000 + "1",
        "[\n" * 3_000,
        '"""\n' * 3_000,
        "x = 1\n(\n" * 1_000,
        "\n".join(" " * depth + "if x:" for depth in range(300)),
        "\0\n\ud800\n" * 3_000,
        "x = 1\n" * 1_000_000,
        "```" * 30_000,
        " \n" * 100_000,
        " " * 1_000_000 + "```",
    ],
    ids=range(16),
)
def test_hard_texts_take_no_time(text):
    start = time.monotonic()
    sanitize(text, "f")
    humaneval_program(PROMPT, text, TEST, "total")
    assert time.monotonic() - start < 20
