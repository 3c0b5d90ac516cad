"""Answers of known verdict are judged right, and no way of writing makes a wrong one right."""

import pytest
from tests.unit.evaluation.code_answers import CONTINUATIONS, DECODE, PROBLEMS, TOTAL, WHOLE

from d2f.evaluation.code_answer import humaneval_program, mbpp_solution, read_answer
from d2f.evaluation.sandbox import Limits, run_programs

GOOD, BAD = TOTAL.head + "    return sum(xs)\n", TOTAL.head + "    return 0\n"


def passed(programs):
    """Whether each passes in the sandbox; equal ones run once."""
    different = list(dict.fromkeys(programs))
    results = dict(zip(different, run_programs(different, Limits(seconds=20)), strict=True))
    return [results[program].passed for program in programs]


def judged(problem, texts):
    rest = problem.prompt, problem.test, problem.entry
    return passed([humaneval_program(rest[0], text, *rest[1:]) for text in texts])


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
    found = dict(zip(names, passed(programs), strict=True))
    assert found == {name: name[-1] for name in names}


ONE_BY_ONE = {
    # Everything that Python would execute counts.
    "a lambda": ("total = lambda xs: sum(xs)\n", True),
    "another function's name": ("def add(xs):\n    return sum(xs)\n\n\ntotal = add\n", True),
    "an import of that name": ("from math import fsum as total\n", True),
    "a partial": ("from functools import partial\n\ntotal = partial(sum, start=0)\n", True),
    "wrapped behind": (
        f"{BAD}\n\ndef more(f):\n    return lambda xs: sum(xs)\ntotal = more(total)",
        True,
    ),
    "wrongly wrapped behind": (
        f"{GOOD}\n\ndef less(f):\n    return lambda xs: 0\ntotal = less(total)",
        False,
    ),
    "under a condition": ("if True:\n    def total(xs):\n        return sum(xs)\n", True),
    "a cache": (
        "from functools import *\n\n\n@lru_cache\ndef one():\n    return 1\n\n\n"
        "def total(xs):\n    return one() * sum(xs)\n",
        True,
    ),
    "a global counter": (
        "calls = 0\n\n\ndef total(xs):\n    global calls\n    calls += 1\n    return sum(xs)\n",
        True,
    ),
    "an attribute of the function": (
        "def total(xs):\n    return sum(xs) + total.more\n\n\ntotal.more = 0\n",
        True,
    ),
    "a variable set by a function": (
        "def fill():\n    global add\n    add = sum\n\n\nfill()\n\n\n"
        "def total(xs):\n    return add(xs)\n",
        True,
    ),
    "a table filled by a function": (
        "T = []\n\n\ndef fill(t):\n    t.append(sum)\n\n\nfill(T)\n\n\n"
        "def total(xs):\n    return T[0](xs)\n",
        True,
    ),
    "a module that is missing, with another": (
        "try:\n    from numpy import sum as add\nexcept ImportError:\n    add = sum\n\n\n"
        "def total(xs):\n    return add(xs)\n",
        True,
    ),
    "a module that is missing": (
        "import numpy as np\n\n\ndef total(xs):\n    return np.sum(xs)\n",
        False,
    ),
    "a helper looked up by its name": (
        "def one(xs):\n    return sum(xs)\n\n\ndef total(xs):\n    return eval('one(xs)')\n",
        True,
    ),
    "a setting": (
        "import sys\n\nsys.setrecursionlimit(5000)\n\n\ndef deep(n):\n"
        "    return n and 1 + deep(n - 1)\n\n\ndef total(xs):\n"
        "    return sum(xs) + deep(3000) - 3000\n",
        True,
    ),
    "a static method": (
        "class Solution:\n    @staticmethod\n    def total(xs):\n        return sum(xs)\n",
        True,
    ),
    "a wrong method": ("class Solution:\n    def total(self, xs):\n        return 0\n", False),
    "tabs": (
        "```python\ndef total(xs):\n\tn = 0\n\tfor x in xs:\n\t\tn += x\n\treturn n\n```",
        True,
    ),
    "a module's docstring with a fence": (
        f'```python\n"""Sums.\n\n```\ntotal([1])\n```\n"""\n{GOOD}```',
        True,
    ),
    "a fence in a narrow docstring": (
        '```python\ndef total(xs):\n  """Sum.\n\n  ```python\n  total([1])\n  ```\n  """\n'
        "  return sum(xs)\n```",
        True,
    ),
    "a docstring that is cut off, and again": (
        f'```python\ndef total(xs):\n    """Add\n```\nOnce more:\n```python\n{GOOD}```',
        True,
    ),
    "a function known by its decorator": (
        "T = {}\n\n\ndef known(f):\n    T[f.__name__] = f\n    return f\n\n\n"
        "@known\ndef add(xs):\n    return sum(xs)\n\n\n"
        "def total(xs):\n    return T['add'](xs)\n",
        True,
    ),
    "a function for a type": (
        "from functools import singledispatch\n\n\n@singledispatch\ndef add(xs):\n"
        "    return 0\n\n\n@add.register\ndef _(xs: list):\n    return sum(xs)\n\n\n"
        "def total(xs):\n    return add(xs)\n",
        True,
    ),
    "a wrong function for a type": (
        "from functools import singledispatch\n\n\n@singledispatch\ndef add(xs):\n"
        "    return sum(xs)\n\n\n@add.register\ndef _(xs: list):\n    return 0\n\n\n"
        "def total(xs):\n    return add(xs)\n",
        False,
    ),
    "a class known by its base": (
        "class Known:\n    them = []\n\n    def __init_subclass__(cls):\n"
        "        Known.them.append(cls)\n\n\nclass Adder(Known):\n"
        "    def add(self, xs):\n        return sum(xs)\n\n\n"
        "def total(xs):\n    return Known.them[0]().add(xs)\n",
        True,
    ),
    "a table filled by another name": (
        "T = []\nsame = T\nsame.append(sum)\nadd = T.append\nadd(0)\n\n\n"
        "def total(xs):\n    return T[0](xs) + T[1]\n",
        True,
    ),
    "the rows of a table changed": (
        "T = [[0], [0]]\nfor i, row in enumerate(T):\n    row[0] = i\n    row.append(sum)\n\n\n"
        "def total(xs):\n    return T[1][1](xs) * T[1][0] + T[0][0]\n",
        True,
    ),
    "in a quotation": (
        "So:\n> 1. ```python\n" + "".join(f"> {line}\n" for line in GOOD.split("\n")) + "> ```",
        True,
    ),
    "a mark of the bytes' order": (f"\ufeff{GOOD}", True),
    # Examples do not.
    "an example's result changed": (
        f"{GOOD}xs = input()\nresult = total(xs)\nresult.sort()\nresult[0] = 1\n"
        "for x in total(xs):\n    x.y = 1\n",
        True,
    ),
    "asks first": (
        f"n = int(input())\nxs = [int(input()) for _ in range(n)]\n{GOOD}print(total(xs))",
        True,
    ),
    "asks for ever": (
        f"{GOOD}while True:\n    try:\n        print(total(input().split()))\n"
        "    except ValueError:\n        pass\n",
        True,
    ),
    "its own name for its result": (f"{GOOD}total = total([1, 2])\nprint(total)\n", True),
    "a builtin's name for its result": (f"{GOOD}list = [1]\nsum = total(list)\nprint(sum)\n", True),
    "leaves": (f"{GOOD}import sys\nsys.exit(0)\n", True),
    "prose that Python takes for code": (f"Note: this\nx\n{GOOD}Done\nExample: y\n", True),
    # A wrong answer stays wrong.
    "nothing but an example": (
        "```python\nprint(total([1, 2]))\nassert total([1, 2]) == 3\n```",
        False,
    ),
    "another name": (f"```python\n{GOOD.replace('total', 'add')}```", False),
    "a name in a longer one": (f"{GOOD.replace('total', 'total_of')}", False),
    "a mistake inside": (
        "def total(xs):\n    if xs:\n        return sum(xs)\n    retrun 0 0\n    return 0\n",
        False,
    ),
    "a mistake behind the return": (f"```python\n{GOOD}    print(\n```", False),
    "cut off behind the return": (f"{GOOD}    # So it is\n    print('the sum", True),
    "cut off before it": (
        "def total(xs):\n    n = 0\n    for x in xs:\n        n += x\n    return (",
        False,
    ),
    "right, then wrong": (f"{GOOD}\n\n{BAD}", False),
    "right in prose, wrong in the fence": (f"{GOOD}\nor\n```python\n{BAD}```", False),
    "wrong, with the right one in C's fence": (f"```python\n{BAD}```\n```c\n{GOOD}```", False),
    "its own check": (f"{BAD}\n\ndef check(f):\n    pass\n\n\ncheck = print\n", False),
    "ends the program": ("import os\n\n\ndef total(xs):\n    os._exit(0)\n", False),
    "ends the program at once": ("import os\nos._exit(0)\n", False),
    "leaves from inside": ("def total(xs):\n    raise SystemExit(0)\n", False),
    "no code": ("The total of xs is `sum(xs)`, so total([1, 2]) is 3.", False),
    "nothing": ("", False),
    "an end token": ("<|endoftext|>", False),
    "a fence and nothing": ("```python\n", False),
}


def test_answers_one_by_one():
    texts = {name: text for name, (text, _) in ONE_BY_ONE.items()}
    windows = [text.replace("\n", "\r\n") for text in texts.values()]
    found = judged(TOTAL, [*texts.values(), *windows])
    expected = {name: right for name, (_, right) in ONE_BY_ONE.items()}
    assert dict(zip(texts, found[: len(texts)], strict=True)) == expected
    assert found[len(texts) :] == found[: len(texts)]


def test_a_helper_of_the_prompt_can_be_replaced():
    """So a right function with a wrong helper is wrong, as both are called by the tests."""
    helper = "def encode(s):\n    return s[::-1]\n\n\n"
    texts = [f"```python\n{DECODE.head}{DECODE.right}```", f"{helper}{DECODE.head}{DECODE.right}"]
    assert judged(DECODE, texts) == [True, False]


def test_mbpp_answers():
    tests = "assert height(tree) == 2\nassert height(None) == 0"
    setup = "tree = Node(1)\ntree.left = Node(2)"
    node = "class Node:\n    left = None\n    def __init__(self, data):\n        self.data = data\n"
    height = "def height(node):\n    return 1 + height(node.left) if node else 0\n"
    texts = [f"[BEGIN]\n{node}{height}", f"```\n{node}```\n```\n{height}```", height, node]
    programs = [f"{mbpp_solution(text, tests, setup)}\n{tests}" for text in texts]
    assert passed(programs) == [True, True, False, False]
    tests = "assert sum(1, 2) == 3"
    texts = ["def sum(a, b):\n    return a + b", "def sum(a, b):\n    return a", "sum = 1"]
    programs = [f"{mbpp_solution(text, tests)}\n{tests}" for text in texts]
    assert passed(programs) == [True, False, False]
