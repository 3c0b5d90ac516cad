"""`benchmarks/sql_values.py`: what a question and its query share is replaced in both."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
NAMES = ("Zelda Quill", "Ines Barros", "Otto Kranich", "Walter Hugh Prins", "Mirko Tavares")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sql_values

    yield sql_values
    sys.modules.pop("sql_values", None)


def database_row(name, number):
    return {
        "question": f"Does {name.upper()} teach {number} , or 400 -level classes of {name} ?",
        "sql": f'SELECT A_0.B FROM A AS A_0 WHERE A_0.N LIKE "%{name}%" AND A_0.NUMBER = {number} '
        f'AND A_0.X BETWEEN 400 AND 400 + 100 AND A_0.YEAR = 2016 AND A_0.S = "WN"',
    }


def table_row(name, column):
    return {
        "columns": ["year", column, "winner"],
        "question": f"What is the {column.title()} of {name} in 1946?",
        "sql": f'SELECT "{column}" FROM table WHERE "winner" = \'{name.lower()}\' '
        'AND "year" = 1946 AND "place" = second',
    }


@pytest.mark.parametrize("seed", range(5))
def test_a_query_keeps_its_form_and_gets_its_questions_texts(script, seed):
    rows = [database_row(name, 250 + i) for i, name in enumerate(NAMES)]
    made = list(script.variants(rows, 4, seed))
    assert len({row["question"] for row in made} | {row["question"] for row in rows}) == 25
    assert len({row["sql"].split("%")[1] for row in made}) > 15
    for row in made:
        name = row["sql"].split("%")[1]
        number = row["sql"].split("NUMBER = ")[1].split()[0]
        level = row["sql"].split("BETWEEN ")[1].split()[0]
        assert len(number) == 3
        assert level.endswith("00")
        same = database_row(name, number)
        assert row["sql"] == same["sql"].replace("400", level)
        assert row["question"] == same["question"].replace("400", level)


@pytest.mark.parametrize("seed", range(5))
def test_a_column_is_replaced_wherever_it_stands(script, seed):
    rows = [table_row(name, f"sector {name.split()[0].lower()}") for name in NAMES]
    for row in script.variants(rows, 4, seed):
        column = row["columns"][1]
        name = row["sql"].split("'")[1]
        year = row["sql"].split('"year" = ')[1].split()[0]
        assert row["columns"] == ["year", column, "winner"]
        same = table_row(" ".join(word[:1].upper() + word[1:] for word in name.split()), column)
        assert row["sql"] == same["sql"].replace("1946", year)
        assert row["question"].lower() == same["question"].replace("1946", year).lower()


def test_words_of_the_task_and_what_the_question_lacks_stay(script):
    row = {"question": "Is it in EECS ?", "sql": 'SELECT A WHERE B = "EECS" AND C = "WN"'}
    values = script.Values([row] * 21 + [database_row(name, 250) for name in NAMES])
    assert values.vary(row, random.Random(0)) is None
    assert script.Values([row] * 20).vary(row, random.Random(0)) is not None
    assert values.vary({"question": "Any WNs ?", "sql": 'A = "WN"'}, random.Random(0)) is None


def test_variants_are_the_same_with_a_seed(script):
    rows = [database_row(name, 250) for name in NAMES]
    one, two, other = (list(script.variants(rows, 3, seed)) for seed in (0, 0, 1))
    assert one == two != other
