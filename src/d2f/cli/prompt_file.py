"""Prompts as users have them: a file of rows, of which each is to be answered."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from d2f.errors import ConfigError, D2FError, counted
from d2f.training.pairs import BadRow, BadRows, Prompt, read_prompt
from d2f.training.rows import JsonPart, ParquetPart
from d2f.training.sections import ColumnConfig

_MESSAGES = "messages"
_PACKED = b"\x1f\x8b"


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """A row with a prompt."""

    number: int
    """The line of the file; of a list or a Parquet file the row, counted from 1."""
    row: Mapping[str, Any]
    prompt: Prompt
    messages: str | None
    """The column with the conversation, if the prompt is one."""


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """A file with one JSON object a line, a `.json` file of a list of them, or a `.parquet` file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "prompts.jsonl"
        >>> _ = path.write_text('{"prompt": "1+1="}')
        >>> PromptFile(path=path).num_rows
        1
    """

    path: Path
    columns: ColumnConfig = ColumnConfig()  # noqa: RUF009 - it is frozen

    def check(self) -> None:
        """Refuse a file in which there is nothing to answer, before a model is loaded.

        Raises:
            ConfigError: It is no file that can be read twice, as going on needs, or is packed.
            D2FError: It cannot be read, has no rows, or only bad ones.
        """
        if not self.path.exists():
            raise ConfigError(f"there is no file '{self.path}' with prompts")
        if not self.path.is_file():
            raise ConfigError(
                f"--input {self.path} is no file; write the prompts to one, which can be read "
                "again by a run that goes on"
            )
        with self.path.open("rb") as file:
            if file.read(2) == _PACKED:
                raise ConfigError(f"{self.path} is packed; unpack it first, as gunzip does")
        bad_rows = BadRows()
        if next(self.prompts(bad_rows), None) is None:
            if not bad_rows.count:
                raise D2FError(f"{self.path} has no rows")
            refuse_all(bad_rows)

    def prompts(self, bad_rows: BadRows) -> Iterator[PromptRow]:
        """All rows that have a prompt, in their order; the others are counted."""
        for where, row in self._part.rows():
            columns = self._columns_of(row)
            try:
                if isinstance(row, BadRow):
                    raise row
                prompt = read_prompt(row, columns)
            except BadRow as error:
                bad_rows.add(where, str(error), row)
                continue
            assert isinstance(row, Mapping)
            number = int(where.rpartition(":")[2])
            yield PromptRow(number=number, row=row, prompt=prompt, messages=columns.messages)

    def where(self, number: int) -> str:
        """How messages name a row."""
        return f"{self.path}:{number}"

    @property
    def sha256(self) -> str:
        """Hash of the file's content."""
        return self._survey[0]

    @property
    def num_rows(self) -> int:
        """Rows, bad ones among them."""
        return self._survey[1]

    @cached_property
    def _part(self) -> JsonPart | ParquetPart:
        if self.path.suffix == ".parquet":
            return ParquetPart(path=self.path)
        return JsonPart(path=self.path, listed=self.path.suffix == ".json")

    @cached_property
    def _survey(self) -> tuple[str, int]:
        digest, num_lines = hashlib.sha256(), 0
        with self.path.open("rb") as file:
            for line in file:
                digest.update(line)
                num_lines += bool(line.strip())
        is_lines = isinstance(self._part, JsonPart) and not self._part.listed
        num_rows = num_lines if is_lines else sum(1 for _ in self._part.rows())
        return digest.hexdigest(), num_rows

    def _columns_of(self, row: object) -> ColumnConfig:
        """The mapping; where none was named, `messages` stands in for a missing `prompt`."""
        columns = self.columns
        plain = columns.messages is None and columns.prompt == ColumnConfig.prompt
        found = isinstance(row, Mapping) and columns.prompt not in row and _MESSAGES in row
        return (
            replace(columns, messages=_MESSAGES, response="response")
            if plain and found
            else columns
        )


def refuse_all(bad_rows: BadRows) -> None:
    """Raise where no row could be answered.

    Raises:
        D2FError: Says why, and which columns there are.
    """
    columns = ", ".join(sorted(bad_rows.columns))
    remedy = f". The rows have the columns: {columns}. Map them: --column prompt=NAME"
    raise D2FError(
        f"none of {counted(bad_rows.count, 'row', ',')} can be answered: {bad_rows.text()}"
        f"{remedy if columns else ''}"
    )
