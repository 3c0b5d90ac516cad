"""Questions to SQL with other names and numbers, so that a model learns to copy them.

A query repeats what its question names: an instructor, a title, a number, a column. A model that is
trained on few names remembers them, and writes a known name where a question has a new one. Here a
text that a question and its query share is replaced in both. Texts of many rows are words of the
task, such as the department EECS; they stay.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

_DATABASE = re.compile(r'"%?(?P<text>[^"%]+)%?"|(?<![\w.])(?P<bare>\d{2,})(?![\w.])')
"""Constants of Advising's queries."""
_TABLE = re.compile(
    r"""(?P<column>"[^"]+")|'(?P<text>(?:[^']|'')+)'|(?<=[=<>]\ )(?P<bare>[^\s"'][^\s"']*)""",
    re.VERBOSE,
)
"""Columns and constants of WikiSQL's queries; a constant of one word has no quotes."""
_WORD = re.compile(r"[^\W\d_]{4,}")
_LONGEST = 60
"""Characters of a shared text; longer ones are sentences."""
_COMMON = 20
"""Rows that share a text; one of more rows is a word of the task."""


class Values:
    """The texts that questions and queries of a collection share.

    Args:
        rows: `question`, `sql`, and `columns` where each question has a table of its own.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        counts = Counter(text for row in rows for text in set(_shared(row)))
        self.common = {text for text, count in counts.items() if count > _COMMON}
        self.words = sorted({word for text in counts for word in _WORD.findall(text)})

    def vary(self, row: Row, draw: random.Random) -> Row | None:
        """Return a row with other texts, or None if its question and query share none.

        Example:
            >>> row = {"question": "Does Anna Lind teach ?", "sql": 'SELECT "Anna Lind"'}
            >>> varied = Values([row]).vary(row, random.Random(1))
            >>> name = varied["sql"].split('"')[1]
            >>> varied["question"] == f"Does {name} teach ?"
            True
        """
        new = {
            text: made
            for text in dict.fromkeys(_shared(row))
            if text not in self.common and (made := self._other(text, draw)) is not None
        }
        if not new:
            return None

        def replace(text: str) -> str:
            made = new.get(text.lower())
            return text if made is None else _cased(made, text)

        def in_query(match: re.Match[str]) -> str:
            for group in ("text", "bare"):
                if match[group] is not None:
                    return match[0].replace(match[group], replace(match[group]))
            return f'"{replace(match[0][1:-1])}"'

        texts = "|".join(re.escape(text) for text in sorted(new, key=len, reverse=True))
        said = re.compile(rf"(?<!\w)(?:{texts})(?!\w)", re.IGNORECASE)
        varied = dict(row)
        varied["question"] = said.sub(lambda match: replace(match[0]), row["question"])
        varied["sql"] = _constants(row).sub(in_query, row["sql"])
        if "columns" in row:
            varied["columns"] = [replace(column) for column in row["columns"]]
        return varied

    def _other(self, text: str, draw: random.Random) -> str | None:
        """Return a number like a number, or as many words as a text has; None for other texts."""
        if text.isascii() and text.isdigit():
            if text.endswith("00"):
                return f"{draw.randint(1, 9)}{text[1:]}"
            return str(draw.randint(10 ** (len(text) - 1), 10 ** len(text) - 1))
        if self.words and _WORD.search(text):
            return " ".join(self._word(draw) for _ in text.split())
        return None

    def _word(self, draw: random.Random) -> str:
        """Return a known word, or the beginning of one with the end of another.

        The second token of such a word cannot be guessed from the first.
        """
        first, second = draw.choice(self.words), draw.choice(self.words)
        if draw.random() < 0.5:
            return first
        return first[: draw.randint(2, len(first))] + second[-draw.randint(2, len(second)) :]


def variants(rows: Sequence[Row], count: int, seed: int) -> Iterator[Row]:
    """Return up to `count` variants of each row, all with different questions."""
    values, draw = Values(rows), random.Random(seed)
    asked = {row["question"] for row in rows}
    for row in rows:
        for _ in range(count):
            varied = values.vary(row, draw)
            if varied is not None and varied["question"] not in asked:
                asked.add(varied["question"])
                yield varied


def _constants(row: Row) -> re.Pattern[str]:
    return _TABLE if "columns" in row else _DATABASE


def _shared(row: Row) -> Iterator[str]:
    """Return the query's constants and columns that the question has, in small letters."""
    question = row["question"].lower()
    for match in _constants(row).finditer(row["sql"]):
        text = (match["text"] or match["bare"] or match[0].strip('"')).lower()
        if len(text) <= _LONGEST and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", question):
            yield text


def _cased(text: str, like: str) -> str:
    """Write words in small or capital letters, or with capital initials, as another text."""
    if like == like.lower():
        return text
    if like == like.upper():
        return text.upper()
    return " ".join(word[:1].upper() + word[1:] for word in text.split())
