"""Prompts that ask for SQL, in the form that training rows and benchmarks share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEXT_TO_SQL = ("advising", "wikisql")
"""The two collections: Advising has one database, WikiSQL a table for each question."""


def sql_prompt(name: str, row: Mapping[str, Any]) -> str:
    r"""Return the prompt that asks for the SQL of a row.

    Args:
        name: The collection, one of `TEXT_TO_SQL`.
        row: `question`, and for WikiSQL `columns`, the names of the table's columns.

    Example:
        >>> sql_prompt("wikisql", {"question": "Who won?", "columns": ["year", "winner"]})
        'Write SQL for a table with the columns year, winner.\nWho won?'
    """
    if name == "advising":
        return f"Write SQL for the course database.\n{row['question']}"
    return f"Write SQL for a table with the columns {', '.join(row['columns'])}.\n{row['question']}"
