"""Files of prompts: rows of JSON or Parquet, each of which is to be answered."""

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
    """Number of the line or, in a list or a Parquet file, of the row; the first is 1."""
    row: Mapping[str, Any]
    prompt: Prompt
    messages: str | None
    """Column with the conversation; None if the prompt is a text."""


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """A file of rows: one JSON object per line, a `.json` list of objects, or a `.parquet` file."""

    path: Path
    columns: ColumnConfig = ColumnConfig()  # noqa: RUF009 - it is frozen

    def check(self) -> None:
        """Refuse a file without any prompt, before a model is loaded."""
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
        """Yield the rows that have a prompt, in order; the others count as bad rows."""
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
        """Return the place of a row, as messages name it."""
        return f"{self.path}:{number}"

    @cached_property
    def sha256(self) -> str:
        """Hash of the file's content."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def num_rows(self) -> int:
        """Number of rows, bad ones included."""
        if isinstance(self._part, ParquetPart) or self._part.listed:
            return sum(1 for _ in self._part.rows())
        with self.path.open("rb") as file:
            return sum(bool(line.strip()) for line in file)

    @cached_property
    def _part(self) -> JsonPart | ParquetPart:
        if self.path.suffix == ".parquet":
            return ParquetPart(path=self.path)
        return JsonPart(path=self.path, listed=self.path.suffix == ".json")

    def _columns_of(self, row: object) -> ColumnConfig:
        """Return the columns to read; by default, `messages` replaces a missing `prompt`."""
        columns = self.columns
        plain = columns.messages is None and columns.prompt == ColumnConfig.prompt
        if plain and isinstance(row, Mapping) and columns.prompt not in row and _MESSAGES in row:
            return replace(columns, messages=_MESSAGES, response="response")
        return columns


def refuse_all(bad_rows: BadRows) -> None:
    """Raise the error of a file of which no row can be answered."""
    columns = ", ".join(sorted(bad_rows.columns))
    remedy = f". The rows have the columns: {columns}. Map them: --column prompt=NAME"
    raise D2FError(
        f"none of {counted(bad_rows.count, 'row', ',')} can be answered: {bad_rows.text()}"
        f"{remedy if columns else ''}"
    )
