"""Reading the final answer."""

from __future__ import annotations

import pytest

from d2f.problems import extract_answer, generate_problems


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She has 3 * 4 = 12 cards.\n#### 12", 12),
        ("####12", 12),
        ("#### 1,234", 1234),
        ("####   7  \n", 7),
        ("#### 1 234", 1234),
        ("#### 5\n#### 6", 6),
        ("#### $40", 40),
        ("#### 12.", 12),
        ("#### -3", -3),
        ("#### \u22123", -3),
        ("#### -$1,200.", -1200),
        ("#### 1 234 567", 1234567),
        ("#### 1, 2, 3", None),
        ("#### 1,2", None),
        ("#### 1,2345", None),
        ("#### 12 34", None),
        ("#### 1,234 567", None),
        ("#### 5-6", None),
        ("#### 1.2e3", None),
        ("#### 8\nand more text", 8),
        ("", None),
        ("12", None),
        ("####", None),
        ("#### ", None),
        ("#### twelve", None),
        ("#### 12 apples", None),
        ("#### 1.5", None),
        ("#### 5\n####", None),
        ("#### 1_000", None),
        ("#### \u0663", None),
        ("#### --3", None),
        ("#### " + "9" * 5000, None),
    ],
)
def test_extract_answer(text: str, answer: int | None) -> None:
    assert extract_answer(text) == answer


def test_every_response_reads_back() -> None:
    for problem in generate_problems(200, seed=4):
        assert extract_answer(problem.response) == problem.answer
