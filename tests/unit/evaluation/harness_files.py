"""A data folder with a few rows of our own in the form of the public files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

GSM8K_TRAIN = [
    {"question": f"Ann has {n} pens and buys {n}. How many?", "answer": f"{n}+{n}\n#### {2 * n}"}
    for n in range(1, 13)
]
GSM8K_TEST = [
    {"question": "Ben has 3 cups and breaks 1. How many?", "answer": "3-1=<<3-1=2>>2\n#### 2"},
    {"question": "A car costs $900 and 100 more. How much?", "answer": "1000 it is.\n#### 1,000"},
    {"question": "It is -2 and falls by 3. What then?", "answer": "-2-3\n#### -5"},
]
MATH500 = [
    {
        "problem": "What is $1+1$?",
        "solution": "It is $\\boxed{2}$.",
        "answer": "2",
        "subject": "Algebra",
        "level": 1,
    },
    {
        "problem": "Halve $1$.",
        "solution": "We get $\\boxed{\\frac{1}{2}}$.",
        "answer": "\\frac{1}{2}",
        "subject": "Prealgebra",
        "level": 2,
    },
]
HUMANEVAL = [
    {
        "task_id": "Own/0",
        "prompt": 'def double(x):\n    """ Twice x.\n    >>> double(2)\n    4\n    """\n',
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
        "entry_point": "double",
    },
    {
        "task_id": "Own/1",
        "prompt": 'from typing import List\n\n\ndef total(xs: List[int]):\n    """ Sum."""\n',
        "canonical_solution": "    return sum(xs)\n",
        "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n",
        "entry_point": "total",
    },
]


def _mbpp(number: int) -> dict[str, object]:
    return {
        "text": f"Write a function to add {number}.",
        "code": f"def add(x):\r\n  return x + {number}",
        "task_id": number,
        "test_setup_code": "",
        "test_list": [f"assert add({n}) == {n + number}" for n in range(3)],
        "challenge_test_list": [],
    }


MBPP = [_mbpp(number) for number in (1, 2, 10, 11, 12, 510, 511, 600, 601)]


def write_jsonl(file: Path, rows: list) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text, encoding="utf-8")
    return file


def write_data(folder: Path) -> Path:
    write_jsonl(folder / "gsm8k" / "train.jsonl", GSM8K_TRAIN)
    write_jsonl(folder / "gsm8k" / "test.jsonl", GSM8K_TEST)
    write_jsonl(folder / "math" / "math500.jsonl", MATH500)
    write_jsonl(folder / "humaneval" / "HumanEval.jsonl.gz", HUMANEVAL)
    write_jsonl(folder / "mbpp" / "mbpp.jsonl", MBPP)
    return folder
