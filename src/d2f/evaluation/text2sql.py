"""Load people's questions to be answered in SQL as tasks: Advising and WikiSQL.

Two queries are equal when their written forms are: white space, upper and lower case outside
quotes, and the order of conditions that AND joins do not count; all else does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from d2f.errors import ConfigError
from d2f.evaluation.benchmark_files import FILES, read_split
from d2f.evaluation.task import Example, Task, Verdict, one_by_one

TEXT_TO_SQL = ("advising", "wikisql")
"""The two collections: Advising has one database, WikiSQL a table for each question."""
Item = str | list["Item"]
"""A token, or the items between two brackets (or CASE and END), which are its first and last."""

_TOKEN = re.compile(
    r"""
    # At the start of a word; a doubled quote is an escaped one.
    (?<![^\s(),;=<>!]) (?P<string> '(?:[^']|'')*'(?!') | "(?:[^"]|"")*"(?!") )
    | [<>!]=|<>|[=<>(),;]
    | [^\s(),;=<>!]+
    | \S
    """,
    re.VERBOSE,
)
_OPENS = {"(": ")", "case": "end"}
_DEEPEST = 50
"""Brackets within brackets; what a model repeats without end may have any number."""
_FOLLOWS = {
    "group", "having", "order", "limit", "offset", "fetch", "window", "union", "intersect",
    "except", ";",
}  # fmt: skip
_JOINS = {"where", "on", "join", "inner", "left", "right", "full", "cross", "natural", ","}
_ENDS = {
    "where": _FOLLOWS,
    "having": _FOLLOWS,
    "on": _FOLLOWS | _JOINS,
    "when": {"then"},
    "()": _FOLLOWS | _JOINS | {"select", "from", "as", "when", "then", "else"},
}
"""Words, and brackets, behind which a condition stands, and those before which it ends.

No other word does: values without quotes hold commas and words like these, `17,000` for one.
"""


def sql_form(sql: str) -> tuple[str, ...]:
    """Split a query into tokens, in small letters outside quotes, with AND's conditions sorted.

    It takes any text, also what is no SQL. A quote opens a string only at the start of a word, and
    only if it is closed; two quotes in a string are one that is escaped.

    Example:
        >>> one = sql_form("SELECT a FROM t WHERE b BETWEEN 1 AND 2 AND c = 'X'")
        >>> one == sql_form("select a from t where c='X' and b between 1 and 2")
        True
        >>> one == sql_form("SELECT a FROM t WHERE b BETWEEN 1 AND 2 AND c = 'x'")
        False
    """
    tokens = [t[0] if t["string"] else t[0].lower() for t in _TOKEN.finditer(sql)]
    return tuple(_flat(_sorted_level(_nested(tokens))))


def first_difference(wanted: Sequence[str], found: Sequence[str]) -> str:
    """Say at which token two forms differ first.

    Example:
        >>> first_difference(sql_form("SELECT a FROM t"), sql_form("SELECT b FROM t"))
        "expected a after 'select', not b"
    """
    same = 0
    while same < min(len(wanted), len(found)) and wanted[same] == found[same]:
        same += 1
    place = f"after '{' '.join(wanted[max(same - 4, 0) : same])}'" if same else "at the start"
    expected, got = (
        tokens[same] if same < len(tokens) else "the end" for tokens in (wanted, found)
    )
    return f"expected {expected} {place}, not {got}"


def _nested(tokens: Sequence[str]) -> list[Item]:
    """Nest tokens by brackets; those that are not closed, or too deep, stay plain tokens."""
    levels: list[list[Item]] = [[]]
    for token in tokens:
        if token in _OPENS and len(levels) <= _DEEPEST:
            levels.append([token])
            continue
        opened = levels[-1][0] if len(levels) > 1 else None
        if isinstance(opened, str) and token == _OPENS[opened]:
            whole = levels.pop()
            levels[-1].append([*whole, token])
        else:
            levels[-1].append(token)
    while len(levels) > 1:
        rest = levels.pop()
        levels[-1] += rest
    return levels[0]


def _sorted_level(items: Sequence[Item], opened: str | None = None) -> list[Item]:
    """Sort the conditions of each run of ANDs, here and within brackets.

    `opened`: what the items stand behind if they begin with a condition.
    """
    result: list[Item] = []
    pending: list[Item] = []
    for item in items:
        if isinstance(item, list):
            # A bracket without a query may hold a condition.
            inside = "()" if item[0] == "(" and item[1] != "select" else None
            item = [item[0], *_sorted_level(item[1:-1], inside), item[-1]]
        word = item if isinstance(item, str) else None
        if opened is not None and word not in _ENDS[opened]:
            pending.append(item)
            continue
        result += [*_sorted_condition(pending), item]
        pending, opened = [], word if word in _ENDS else None
    return result + _sorted_condition(pending)


def _sorted_condition(items: Sequence[Item]) -> list[Item]:
    result: list[Item] = []
    for number, part in enumerate(_split(items, "or")):
        result += ["or"] if number else []
        conditions = sorted(_split(part, "and"), key=lambda found: tuple(_flat(found)))
        for place, condition in enumerate(conditions):
            result += ["and"] if place else []
            result += condition
    return result


def _split(items: Sequence[Item], word: str) -> list[list[Item]]:
    """Split items at a word, but for the AND that belongs to a BETWEEN."""
    parts: list[list[Item]] = [[]]
    between = False
    for item in items:
        if item == word and not (between and word == "and"):
            parts.append([])
            continue
        between = item == "between" or (between and item != "and")
        parts[-1].append(item)
    return parts


def _flat(items: Sequence[Item]) -> Iterator[str]:
    for item in items:
        if isinstance(item, str):
            yield item
        else:
            yield from _flat(item)


def sql_prompt(name: str, row: Mapping[str, Any]) -> str:
    r"""Return the prompt that asks for the SQL of a row of a collection.

    Example:
        >>> sql_prompt("wikisql", {"question": "Who won?", "columns": ["year", "winner"]})
        'Write SQL for a table with the columns year, winner.\nWho won?'
    """
    if name == "advising":
        return f"Write SQL for the course database.\n{row['question']}"
    return f"Write SQL for a table with the columns {', '.join(row['columns'])}.\n{row['question']}"


def load_text_to_sql(
    name: str,
    *,
    num_examples: int | None = None,
    split: str = "test",
    data: str | Path | None = None,
) -> Task:
    """Load the questions of a split; an answer is correct if its SQL has the same form as gold.

    Arguments are those of `load_task`, `name` one of `TEXT_TO_SQL`.

    Raises:
        ConfigError: No folder is named, or the file is missing or broken.

    Example:
        `load_text_to_sql("advising", data="data", split="validation")` reads
        data/text2sql/advising.validation.jsonl.gz.
    """
    if data is None:
        files = FILES[name]
        raise ConfigError(
            f"the task {name} reads {files.folder}/{files.splits[split]} (or .gz) from a folder; "
            f"name the folder as data; {files.origin}"
        )
    rows = [row for _, row in read_split(name, split, data)][:num_examples]
    return Task(
        name=name,
        problems=[
            Example(
                id=f"{split}-{number}", prompt=sql_prompt(name, row), response=row["sql"].strip()
            )
            for number, row in enumerate(rows)
        ],
        mark=one_by_one(_verdict),
    )


def _verdict(example: Example, text: str) -> Verdict:
    wanted, found = sql_form(example.response or ""), sql_form(text)
    correct = wanted == found
    return Verdict(
        correct=correct,
        answer=text.strip(),
        reason=None if correct else first_difference(wanted, found),
        metrics={"exact_match": float(correct)},
    )
