"""The program in an answer as the paper's authors find it."""

import ast
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.evaluation.odd_texts import HARD_TEXTS, ODD_TEXTS, PROGRAM_LINES

from d2f.evaluation.code_paper import _longest_run, extract_code, paper_solution, sanitize

WHOLE = "def total(xs):\n    return sum(xs)\n"

FENCES = {
    "no fence": ("x = 1\n", "x = 1\n"),
    "python": ("Hi\n```python\nx = 1\n```\nBye", "x = 1\n"),
    "not the first": ("```\nold\n```\nthen\n```python\nx = 1\n```", "x = 1\n"),
    "the first of two": ("```python\nx = 1\n```\nor\n```python\nx = 2\n```", "x = 1\n"),
    "not closed": ("Hi\n```python\nx = 1\ny = 2", "x = 1\ny = 2"),
    "no other name": ("x = 1\n```py\ny = 2\n```", "x = 1\n"),
    "fence in a string": ('```python\nx = "```"\ny = 2\n```', 'x = "'),
    "closed by the prompt's": ("    return 1\n```\n", "    return 1\n"),
    "empty": ("", ""),
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


def test_a_solution_is_found_in_a_hundred_lines():
    prompt = 'def total(xs):\n    """Add up."""\n'
    fenced = f"Here:\n```python\n{WHOLE}```\n"
    assert paper_solution(prompt, fenced, "total") == WHOLE.strip()
    late = "```python\n" + "# more\n" * 98 + WHOLE
    assert paper_solution(prompt, late, "total") == ""
    assert paper_solution(prompt, "\treturn sum(xs)\n", "total").endswith("return sum(xs)")


@settings(max_examples=100, deadline=None)
@given(ODD_TEXTS)
def test_no_text_raises(text):
    ast.parse(sanitize(text, "f"))
    ast.parse(paper_solution("def f(x):\n", text, "f"))


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


@pytest.mark.parametrize("number", range(len(HARD_TEXTS)))
def test_hard_texts_take_no_time(number):
    assert isinstance(sanitize(HARD_TEXTS[number], "f"), str)
