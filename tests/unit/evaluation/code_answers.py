"""Answers of known verdict: problems of all kinds, and the ways in which people and models answer.

Each way writes down a right or a wrong body, so it has to come out as right or wrong as that.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A function to write, with a right and a wrong body."""

    entry: str
    prompt: str
    right: str
    wrong: str
    check: str
    around: str = ""
    """What the bodies need beside the function."""
    given: str = ""
    """What of the prompt a whole program repeats."""

    @property
    def head(self) -> str:
        start = self.prompt.rindex(f"def {self.entry}")
        start = self.prompt.rfind("\n", 0, start) + 1
        return self.prompt[start : self.prompt.index("\n", start) + 1]

    @property
    def test(self) -> str:
        return "def check(candidate):\n" + textwrap.indent(self.check, "    ")


TOTAL = Problem(
    entry="total",
    prompt='from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """Add up.\n'
    '    >>> total([1, 2])\n    3\n    """\n',
    right="    result = 0\n    for x in xs:\n        result += x\n    return result\n",
    wrong="    result = 1\n    for x in xs:\n        result += x\n    return result\n",
    check="assert candidate([1, 2]) == 3\nassert candidate([]) == 0\n",
    given="from typing import List\n\n",
)
DECODE = Problem(
    entry="decode",
    prompt='\n\ndef encode(s: str):\n    """\n    returns s turned around, with a mark\n    """\n'
    '    return s[::-1] + "!"\n\n\ndef decode(s: str):\n    """\n    undoes encode\n    """\n',
    right="    return s[:-1][::-1]\n",
    wrong="    return s[::-1]\n",
    check='for word in ("", "ab", "a!"):\n    assert candidate(encode(word)) == word\n',
)
COUNT = Problem(
    entry="count_ways",
    prompt='def count_ways(n: int) -> int:\n    """Ways to climb n steps by one or two."""\n',
    right="    return WAYS[n]\n",
    wrong="    return WAYS[n - 1]\n",
    check="assert [candidate(n) for n in (1, 2, 3, 9)] == [1, 2, 3, 55]\n",
    around="WAYS = [1, 1]\nfor n in range(2, 50):\n    WAYS.append(WAYS[n - 1] + WAYS[n - 2])\n",
)
PRICE = Problem(
    entry="price",
    prompt='def price(name: str) -> int:\n    """The price of a thing; 0 if it is unknown."""\n',
    right="    note(name)\n    return (PRICES.get(name) or 0) * factor\n",
    wrong="    note(name)\n    return PRICES.get(name) * factor\n",
    check='assert candidate("pen") == 6\nassert candidate("ink") == 10\n'
    'assert candidate("") == 0\n',
    around='PRICES = {"pen": 3}\nPRICES["ink"] = 4\nPRICES["ink"] += 1\nfactor = 1\nfactor += 1\n'
    "seen = set()\n\n\ndef note(name):\n    seen.add(name)\n",
)
EVENS = Problem(
    entry="evens",
    prompt='from typing import Iterator\n\n\ndef evens(n: int) -> Iterator[int]:\n    """Even '
    'numbers below n.\n\n    ```\n    list(evens(3)) == [0, 2]\n    ```\n    """\n',
    right="    for x in numbers(n):\n        if x % 2 == 0:\n            yield x\n",
    wrong="    for x in numbers(n):\n        if x % 2 == 1:\n            yield x\n",
    check="assert list(candidate(5)) == [0, 2, 4]\nassert list(candidate(0)) == []\n",
    around="def numbers(n):\n    yield from range(n)\n",
    given="from typing import Iterator\n\n",
)
ROOT = Problem(
    entry="whole_root",
    prompt='import math\n\n\ndef whole_root(n: int) -> int:\n    """The root, rounded down."""\n',
    right="    return root(n, Rounder())\n",
    wrong="    return root(n + 1, Rounder())\n",
    check="assert [candidate(n) for n in (0, 3, 4, 10, 24, 25)] == [0, 1, 2, 3, 4, 5]\n",
    around="try:\n    from math import isqrt\nexcept ImportError:\n    isqrt = None\n\n\n"
    "class Rounder:\n    def down(self, x):\n        return math.floor(x)\n\n\n"
    "def traced(f):\n    return f\n\n\n@traced\ndef root(n, rounder):\n"
    "    return isqrt(n) if isqrt else rounder.down(math.sqrt(n))\n",
    given="import math\n\n",
)
FLIP = Problem(
    entry="flip",
    prompt='def flip(xs: list) -> None:\n    """Turn the list around in place."""\n',
    right="    swap = lambda i, j: xs.__setitem__(slice(i, j), xs[i:j][::-1])\n"
    "    swap(0, len(xs))\n",
    wrong="    swap = lambda i, j: xs.__setitem__(slice(i, j), xs[i:j])\n    swap(0, len(xs))\n",
    check="xs = [1, 2, 3]\nassert candidate(xs) is None\nassert xs == [3, 2, 1]\n",
)
LATER = Problem(
    entry="later",
    prompt='async def later(x: int) -> int:\n    """Twice x, when it is awaited."""\n',
    right="    return await twice(x)\n",
    wrong="    return await twice(x) + 1\n",
    check="try:\n    candidate(3).send(None)\nexcept StopIteration as end:\n"
    "    assert end.value == 6\nelse:\n    assert False\n",
    around="async def twice(x):\n    return 2 * x\n",
)
FENCED = Problem(
    entry="fenced",
    prompt='def fenced(text: str) -> str:\n    """Put the text into a fence of Markdown."""\n',
    right='    return f"{MARK}python\\n{text}\\n{MARK}"\n',
    wrong='    return f"{MARK}\\n{text}\\n{MARK}"\n',
    check='assert candidate("x = 1") == "\\n".join(["`" * 3 + "python", "x = 1", "`" * 3])\n',
    around='MARK = "```"\nASIDE = """\n```python\ndef fenced(text):\n    return ""\n```\n"""\n',
)
PROBLEMS = (TOTAL, DECODE, COUNT, PRICE, EVENS, ROOT, FLIP, LATER, FENCED)

OUTPUT, STUB, FAILS = "1\n[2, 3]\n", "    ...\n", "print(1 / 0)\n"

Way = Callable[[Problem, str, str], str]
"""(problem, the body that counts, the other one) to an answer."""


def _body(p: Problem, body: str) -> str:
    return f"{body}\n\n{p.around}" if p.around else body


def _whole(p: Problem, body: str) -> str:
    return f"{p.given}{p.around}\n\n{p.head}{body}"


def _fence(code: str, info: str = "python", mark: str = "```") -> str:
    return f"{mark}{info}\n{code}{mark}\n"


def _demo(p: Problem) -> str:
    return (
        f"\nresult = {p.entry}(unknown)\nn = int(input())\nprint({p.entry}(n))\nassert False, n\n"
        "sum = list = 0\nfor case in cases:\n    print(case)\nraise SystemExit\n"
        f"if __name__ != '__mine__':\n    print({p.entry}(*input().split()))\n"
    )


def _main(p: Problem) -> str:
    return (
        f"\n\ndef main():\n    n = int(input())\n    print({p.entry}(n))\n\n\nmain()\n"
        "import unittest\n\n\nclass Test(unittest.TestCase):\n    def test(self):\n"
        f"        self.assertEqual({p.entry}(), 7)\n\n\nunittest.main()\n"
    )


def _transcript(p: Problem) -> str:
    return f">>> {p.entry}(1)\n1\n>>> {p.entry} = None\n"


def _named(p: Problem, code: str, name: str) -> str:
    return code.replace(f"def {p.entry}(", f"def {name}(")


def _solution(p: Problem, body: str) -> str:
    method = p.head.replace(f"{p.entry}(", f"{p.entry}(self, ") + body
    return f"{p.given}{p.around}\n\nclass Solution:\n{textwrap.indent(method, '    ')}"


CONTINUATIONS: dict[str, Way] = {
    "body": lambda p, body, other: _body(p, body),
    "a blank line first": lambda p, body, other: "\n" + _body(p, body),
    "prose behind": lambda p, body, other: _body(p, body) + "\n\nThis (it's simple) works.\n",
    "demonstration behind": lambda p, body, other: _body(p, body) + _demo(p),
    "main behind": lambda p, body, other: _body(p, body) + _main(p),
    "another one begun behind": lambda p, body, other: (
        f"{_body(p, body)}\n\ndef next_one(x):\n    return [x, ("
    ),
    "itself begun again behind": lambda p, body, other: f"{_body(p, body)}\n\n{p.head}    if (",
    "closes the prompt's fence": lambda p, body, other: (
        f"{_body(p, body)}```\n\nThis adds.\n\n{_fence(FAILS)}"
    ),
    "Windows and end token": lambda p, body, other: (
        _body(p, body).replace("\n", "\r\n") + "<|im_end|>\n<|im_start|>user\r\nThanks!"
    ),
    "tabs": lambda p, body, other: (
        "\n".join(
            line.replace("    ", "\t") if line.startswith(" ") else line
            for line in body.split("\n")
        )
        + ("\n" + p.around if p.around else "")
    ),
    "first indent lost": lambda p, body, other: _body(p, body).lstrip(" "),
    "fenced": lambda p, body, other: _fence(_body(p, body)),
    "fenced beside the rest": lambda p, body, other: f"{_fence(body)}\n{_fence(p.around)}",
    "at the margin": lambda p, body, other: (
        f"{_fence(textwrap.dedent(body))}\nWith:\n{_fence(p.around)}"
    ),
    "the other one as a comment": lambda p, body, other: (
        _body(p, body) + "\n" + textwrap.indent(f"{p.head}{other}", "# ")
    ),
}
"""Ways that go on where the prompt ends."""

WHOLE: dict[str, Way] = {
    "python": lambda p, body, other: f"Here you are:\n\n{_fence(_whole(p, body))}\nIt's done!\n",
    "py": lambda p, body, other: _fence(_whole(p, body), "py"),
    "Python3": lambda p, body, other: _fence(_whole(p, body), " Python3"),
    "no name": lambda p, body, other: _fence(_whole(p, body), ""),
    "a title": lambda p, body, other: _fence(_whole(p, body), 'python title="a.py"'),
    "braces": lambda p, body, other: _fence(_whole(p, body), "{.python .numbered}"),
    "tildes": lambda p, body, other: _fence(_whole(p, body), mark="~~~"),
    "four marks": lambda p, body, other: _fence(_whole(p, body), mark="````"),
    "not closed": lambda p, body, other: f"So:\n```python\n{_whole(p, body)}",
    "cut off in a demonstration": lambda p, body, other: (
        f"```python\n{_whole(p, body)}\n# Try it:\nprint({p.entry}([1, 2"
    ),
    "in a list": lambda p, body, other: (
        "1. Write this:\n" + textwrap.indent(_fence(_whole(p, body)), "   ") + "2. Be glad.\n"
    ),
    "deep in a list": lambda p, body, other: (
        "- First\n    - " + textwrap.indent(_fence(_whole(p, body)), "      ").lstrip()
    ),
    "behind a sentence": lambda p, body, other: "Take this: " + _fence(_whole(p, body)),
    "prompt repeated": lambda p, body, other: _fence(f"{p.prompt}{body}\n\n{p.around}"),
    "unfenced": lambda p, body, other: f"{p.prompt}{body}\n\n{p.around}",
    "unfenced in prose": lambda p, body, other: (
        f"Sure! (It's easy.)\n\n{_whole(p, body)}\n\nHope: this helps (a bit\n"
    ),
    "a space first": lambda p, body, other: " " + _whole(p, body).lstrip(),
    "usage first": lambda p, body, other: (
        f"Use it:\n{_fence(f'from mine import {p.entry}{_demo(p)}')}\n{_fence(_whole(p, body))}"
    ),
    "tests behind": lambda p, body, other: (
        f"{_fence(_whole(p, body))}\nTests:\n{_fence(f'import {p.entry}{_main(p)}assert 0')}"
    ),
    "output behind": lambda p, body, other: f"{_fence(_whole(p, body))}\n{_fence(OUTPUT, '')}",
    "a transcript": lambda p, body, other: f"{_fence(_whole(p, body))}\n{_fence(_transcript(p))}",
    "in two fences": lambda p, body, other: (
        f"Helpers:\n{_fence(p.given + p.around)}\nThe rest:\n{_fence(p.head + body)}"
    ),
    "helpers last": lambda p, body, other: (
        f"{_fence(p.given + p.head + body)}\nHelpers:\n{_fence(p.around)}"
    ),
    "class Solution": lambda p, body, other: _fence(_solution(p, body)),
    "demonstration behind": lambda p, body, other: _fence(_whole(p, body) + _demo(p)),
    "main behind": lambda p, body, other: _fence(_whole(p, body) + _main(p)),
    "redefined": lambda p, body, other: _fence(f"{_whole(p, other)}\n\n{p.head}{body}"),
    "redefined in a later fence": lambda p, body, other: (
        f"{_fence(_whole(p, other))}\nBetter:\n{_fence(_whole(p, body))}"
    ),
    "a stub behind": lambda p, body, other: (
        f"{_fence(_whole(p, body))}\nIt has the form\n{_fence(p.head + STUB)}"
    ),
    "the other one of another name": lambda p, body, other: (
        f"{_fence(_named(p, _whole(p, other), 'attempt'))}{_fence(_whole(p, body))}"
    ),
    "the other one in another language": lambda p, body, other: (
        f"{_fence(_whole(p, body))}\n{_fence(_whole(p, other), 'text')}"
    ),
    "the other one in a string": lambda p, body, other: _fence(
        f"{_whole(p, body)}\nOLD = r'''\n{_whole(p, other)}\n'''\n"
    ),
    "the other one under a condition": lambda p, body, other: _fence(
        f"{_whole(p, body)}\nif __name__ == '__main__':\n"
        + textwrap.indent(f"{p.head}{other}", "    ")
    ),
    "the future": lambda p, body, other: _fence(
        f"from __future__ import annotations\n{_whole(p, body)}"
    ),
    "numpy, not used": lambda p, body, other: _fence(f"import numpy as np\n{_whole(p, body)}"),
    "thought before": lambda p, body, other: (
        f"<think>\nLet me see: {p.entry}?\n</think>\n{_fence(_whole(p, body))}</s>"
    ),
}
"""Ways that give the whole function."""
