"""People's questions to be answered in SQL, as tasks: Advising and WikiSQL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from d2f.errors import ConfigError
from d2f.evaluation.benchmark_files import FILES, read_split
from d2f.evaluation.sql_form import first_difference, sql_form
from d2f.evaluation.task import Example, Verdict
from d2f.problems.text2sql import sql_prompt


def load_text_to_sql(
    name: str,
    *,
    num_examples: int | None = None,
    split: str = "test",
    data: str | Path | None = None,
) -> TextToSql:
    """Load the questions of a split.

    Args:
        name: One of `d2f.problems.text2sql.TEXT_TO_SQL`.
        num_examples: The first so many questions; None, or more than there are: all.
        split: "test", or "validation": other questions, to choose settings on.
        data: The folder of the files, or the one above it.

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
    return TextToSql(
        name,
        [
            Example(
                id=f"{split}-{number}", prompt=sql_prompt(name, row), response=row["sql"].strip()
            )
            for number, row in enumerate(rows)
        ],
    )


class TextToSql:
    """Questions with their SQL; right is who writes the same SQL, but for its form (`sql_form`).

    Example:
        >>> task = TextToSql("advising", [
        ...     Example(id="0", prompt="Who?", response="SELECT a FROM t WHERE b = 1 AND c = 2")])
        >>> task.judge(task.examples(), ["select a from t where c = 2 and b = 1"])[0].correct
        True
    """

    stop: tuple[str, ...] = ()

    def __init__(self, name: str, examples: Sequence[Example]) -> None:
        self.name = name
        self._examples = tuple(examples)

    def examples(self) -> Sequence[Example]:
        """The questions, in the file's order."""
        return self._examples

    def judge(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Verdict]:
        """Compare queries in their one form."""
        return [
            _verdict(example.response or "", text)
            for example, text in zip(examples, texts, strict=True)
        ]


def _verdict(gold: str, text: str) -> Verdict:
    wanted, found = sql_form(gold), sql_form(text)
    correct = wanted == found
    return Verdict(
        correct=correct,
        answer=text.strip(),
        reason=None if correct else first_difference(wanted, found),
        metrics={"exact_match": float(correct)},
    )
