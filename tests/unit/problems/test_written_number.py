"""Numbers as people write them."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2f.problems.written_number import last_number, whole_number

MINUS = "\N{MINUS SIGN}"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,200.", "1200"),
        ("-3 or 2.50 \\$", "2.5"),
        ("no", None),
        ("", None),
        ("1" * 2000, None),
        # Dashes that join or subtract, and signs.
        ("5-6", "6"),
        ("pages 10\N{EN DASH}12", "12"),
        (f"5{MINUS}6", "6"),
        ("5 - 6", "6"),
        ("(x+1)-6", "6"),
        ("x^{2}-6", "6"),
        ("20%-30%", "30"),
        ("GPT-4", "4"),
        ("2024-01-02", "2"),
        ("555-1234", "1234"),
        ("-6", "-6"),
        (f"{MINUS}6", "-6"),
        ("x=-6", "-6"),
        ("5 + (-6)", "-6"),
        ("5*-6", "-6"),
        ("from 3 to -6", "-6"),
        ("it is **-6**", "-6"),
        ("$-6$", "-6"),
        ("- 6 apples", "6"),
        ("-$1,200", "-1200"),
        ("\N{EURO SIGN}7", "7"),
        # Decimals.
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("$.75", "0.75"),
        ("it is .25.", "0.25"),
        ("wait...5", "5"),
        ("see no.5", "5"),
        ("1.2.3", "3"),
        ("3.0", "3"),
        ("2.50", "2.5"),
        # Powers of ten.
        ("1.2e3", "1200"),
        ("1E3", "1000"),
        ("2.5e-3", "0.0025"),
        (f"1e{MINUS}2", "0.01"),
        ("-1e+2", "-100"),
        (".5e1", "5"),
        ("4 eggs, 3 each", "3"),
        ("3e", "3"),
        # Lists of numbers.
        ("1,2,3", "3"),
        ("1, 2, 3", "3"),
        ("(1,2)", "2"),
        ("[10,20,30]", "30"),
        ("3,14", "14"),
        ("1,23", "23"),
        ("1234,567", "567"),
        ("1,234,56", "56"),
        ("12,345,6,789", "789"),
        ("0,123", "123"),
        ("1,2.5", "2.5"),
        ("1,-2", "-2"),
        # Thousands.
        ("1,234", "1234"),
        ("12,345,678.90 in all", "12345678.9"),
        ("1,234, 5", "5"),
        ("of 1,000,", "1000"),
        ("-1,234", "-1234"),
        ("1,234e2", "123400"),
        ("5-1,234", "1234"),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


NUMBERS = st.decimals(-(10**12), 10**12, allow_nan=False, places=3)
STYLES = st.sampled_from(["plain", "grouped", "power", "bare"])


def written(number: Decimal, style: str, minus: str) -> str:
    size = abs(number)
    if style == "power":
        text = f"{size:.20e}"
    elif style == "grouped":
        text = f"{size:,.3f}"
    else:
        text = f"{size:.3f}"
        if style == "bare":
            text = text.removeprefix("0").rstrip("0").rstrip(".") or "0"
    return (minus if number < 0 else "") + text


@given(
    st.lists(st.tuples(NUMBERS, STYLES, st.sampled_from(["-", MINUS])), min_size=1, max_size=4),
    st.sampled_from([" ", ", ", " and ", " = ", "\n#### ", " (", "; "]),
    st.sampled_from(["", ".", ", then", ") ", " %", "\n", "!"]),
)
def test_the_last_of_several_is_read_back(numbers, between, end):
    text = between.join(written(*number) for number in numbers)
    assert last_number(text + end) == numbers[-1][0]


@given(st.lists(st.integers(0, 99), min_size=2, max_size=8))
def test_a_list_is_no_number_of_digits(numbers):
    text = ",".join(map(str, numbers))
    assert last_number(text) == numbers[-1]
    assert whole_number(text) is None


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.sampled_from(["-", MINUS, "\N{EN DASH}"]))
def test_a_range_ends_with_its_second_number(first, second, dash):
    assert last_number(f"{first}{dash}{second}") == second


@given(st.integers(-(10**12), 10**12), st.sampled_from([",", " ", ""]), st.sampled_from(["", "."]))
def test_whole_numbers_are_read_back(number, comma, end):
    text = f"{number:,}".replace(",", comma)
    for minus in ("-", MINUS):
        assert whole_number(text.replace("-", minus) + end) == number


def test_long_texts_take_no_long_time_to_read():
    # Each of them once more for each of its characters would take minutes.
    for text in ("1," * 50_000, "111," * 50_000 + "1", "1e" * 50_000, "-" * 100_000, "1" * 100_000):
        last_number(text)
