"""The one form of a query: what does not count, and that all else does."""

from __future__ import annotations

import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2f.evaluation.text2sql import first_difference, sql_form

VALUES = (
    "2016", "'O''Hara and (AND) sons'", '"say ""and"" WHERE"', "6'5", "1st", "'a AND b'", "3 + 1"
)  # fmt: skip


def make_condition(random, depth=2):
    """A condition as a list of parts that AND joins, each a text, or texts and conditions."""
    return [_part(random, depth) for _ in range(random.randint(1, 4))]


def _part(random, depth):
    column = random.choice(["T.A", '"crowd (and)"', "COURSE_0.NAME", "B"])
    value = random.choice(VALUES)
    kind = random.randint(0, 6 if depth else 2)
    if kind < 2:
        return f"{column} {random.choice(['=', '<', '>=', 'NOT LIKE'])} {value}"
    if kind == 2:
        return f"{column} BETWEEN {value} AND 300 + 100"
    inner = make_condition(random, depth - 1)
    if kind == 3:
        return ("( ", inner, " OR ", make_condition(random, depth - 1), " )")
    if kind == 4:
        return (f"{column} IN ( SELECT X FROM T AS U WHERE ", inner, " ORDER BY X , Y )")
    if kind == 5:
        return (f"{column} > ( SELECT MAX( X ) FROM T INNER JOIN U ON ", inner, " GROUP BY X )")
    return ("CASE WHEN ", inner, " THEN 1 ELSE 0 END = 1")


def written(condition, order):
    """The text of a condition, its parts in the order that `order` gives to them."""
    parts = [
        part
        if isinstance(part, str)
        else "".join(bit if isinstance(bit, str) else written(bit, order) for bit in part)
        for part in condition
    ]
    return " AND ".join(order(parts))


FRAMES = (
    "SELECT DISTINCT A , B FROM T AS U WHERE {}",
    "SELECT COUNT( * ) > 0 FROM ( SELECT A FROM T WHERE {} LIMIT 1 ) AS V ORDER BY A DESC",
    "SELECT A FROM T GROUP BY A HAVING {} ORDER BY B LIMIT 1",
    "SELECT A FROM T INNER JOIN U ON {} LEFT JOIN V ON A = B WHERE A = 1 UNION SELECT B FROM V",
)


@given(st.integers(0, 2**32))
def test_the_order_of_conditions_joined_by_and_does_not_count(seed):
    random = Random(seed)
    frame, condition = random.choice(FRAMES), make_condition(random)
    gold = frame.format(written(condition, list))
    for _ in range(3):
        shuffled = written(condition, lambda parts: random.sample(parts, len(parts)))
        assert sql_form(frame.format(shuffled)) == sql_form(gold)


@given(st.integers(0, 2**32))
def test_another_literal_column_or_word_counts(seed):
    random = Random(seed)
    gold = random.choice(FRAMES).format(written(make_condition(random), list))
    at = random.choice([at for at, letter in enumerate(gold) if letter.isalnum()])
    assert sql_form(f"{gold[: at + 1]}q{gold[at + 1 :]}") != sql_form(gold)


@given(st.integers(0, 2**32))
def test_white_space_and_case_outside_quotes_do_not_count(seed):
    random = Random(seed)
    gold = random.choice(FRAMES).format(written(make_condition(random), list))
    quoted = re.compile(r"""('(?:[^']|'')*'(?!\d)|"(?:[^"]|"")*")""")
    bits = quoted.split(gold.replace("6'5", "6`5"))
    other = "".join(
        bit if number % 2 else bit.lower().replace(" ", random.choice([" ", "\n", "\t  "]))
        for number, bit in enumerate(bits)
    )
    assert sql_form(other.replace("6`5", "6'5")) == sql_form(gold)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("SELECT a FROM t WHERE b = 1 OR c = 2", "SELECT a FROM t WHERE c = 2 OR b = 1"),
        ("SELECT a , b FROM t", "SELECT b , a FROM t"),
        ("SELECT a FROM t WHERE b = 'x'", "SELECT a FROM t WHERE b = 'X'"),
        ("SELECT a FROM t WHERE b = 'x  y'", "SELECT a FROM t WHERE b = 'x y'"),
        ("SELECT a FROM t WHERE b = 'x'", 'SELECT a FROM t WHERE b = "x"'),
        ("SELECT a FROM t WHERE b BETWEEN 1 AND 2", "SELECT a FROM t WHERE b BETWEEN 2 AND 1"),
        ("SELECT a FROM t WHERE b = 'it''s'", "SELECT a FROM t WHERE b = 'its'"),
        (
            "SELECT a FROM t WHERE ( b = 1 OR c = 2 ) AND d = 3",
            "SELECT a FROM t WHERE b = 1 OR ( c = 2 AND d = 3 )",
        ),
        (
            "SELECT a FROM t WHERE b = 1 AND c = 2 OR d = 3",
            "SELECT a FROM t WHERE b = 1 AND d = 3 OR c = 2",
        ),
        ("SELECT a FROM t WHERE b = 1", "SELECT a FROM t WHERE b = 1 AND b = 1"),
        ("SELECT a FROM t WHERE b = 1", "SELECT a FROM t WHERE b = 1;"),
        (
            "SELECT a FROM t JOIN u ON b AND c , v WHERE d",
            "SELECT a FROM t JOIN u ON c , v AND b WHERE d",
        ),
        ("SELECT a FROM t", ""),
    ],
)
def test_what_is_another_query_stays_another(one, other):
    assert sql_form(one) != sql_form(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("SELECT COUNT( * ) FROM t WHERE a>=1", "select count(*)\nfrom t  where a >= 1"),
        ("SELECT a FROM t WHERE b = 6'5 AND c = 'x'", "SELECT a FROM t WHERE c = 'x' AND b = 6'5"),
        ("SELECT a FROM t WHERE b = 'Never closed", "select a FROM t WHERE b = 'never  closed"),
        (
            "SELECT a FROM t WHERE left = 17,000 AND c = played as on the right AND d = 1 ;",
            "SELECT a FROM t WHERE d = 1 AND left = 17,000 AND c = played as on the right;",
        ),
        (
            "SELECT a FROM t JOIN u ON b = 1 AND c = 2 , v WHERE d = 3 AND e = 4 LIMIT 1 OFFSET 2",
            "SELECT a FROM t JOIN u ON c = 2 AND b = 1, v WHERE e = 4 AND d = 3 LIMIT 1 OFFSET 2",
        ),
        (
            "SELECT a FROM t WHERE b = 1 AND c = 2 OR d = 3 AND e = 4",
            "SELECT a FROM t WHERE c = 2 AND b = 1 OR e = 4 AND d = 3",
        ),
    ],
)
def test_only_the_form_differs(one, other):
    assert sql_form(one) == sql_form(other)


@given(st.text(alphabet="aA '\"(),=<>and\n", max_size=60))
def test_any_text_has_a_form(text):
    form = sql_form(text)
    assert sql_form(" ".join(form)) == form or "'" in text or '"' in text


@pytest.mark.parametrize(
    "text", ["(" * 3000, "(" * 3000 + ")" * 3000, "case " * 3000 + "end " * 3000]
)
def test_what_repeats_without_end_has_a_form(text):
    assert "".join(sql_form(text)) == text.replace(" ", "")


def test_the_first_difference_is_told():
    wanted, found = (
        sql_form(f"SELECT a FROM t WHERE c = 1 AND b = {n}") for n in ("'y'", "'Y' LIMIT 1")
    )
    assert first_difference(wanted, found) == "expected 'y' after 't where b =', not 'Y'"
    assert first_difference(wanted, wanted[:3]) == "expected t after 'select a from', not the end"
    assert first_difference(wanted, ()) == "expected select at the start, not the end"
