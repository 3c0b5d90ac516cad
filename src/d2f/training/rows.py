"""Rows of data as users have them: JSON and Parquet files, folders of them, sets of the hub.

Rows are read one after the other and never held; only a `.json` file that is one list is read
whole. Free of torch, and `datasets` and `pyarrow` are imported when they are needed.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2f.errors import TrainingError, first_line, unknown_name
from d2f.hub import expanded, is_hub_id
from d2f.training.pairs import BadRow

if TYPE_CHECKING:
    from d2f.training.sections import DataConfig

Row = tuple[str, object]
"""The place of a row, as `file:line`, and its content; a `BadRow` if it cannot be read."""

SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".json")
_SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
_BATCH = 256
_BOM = b"\xef\xbb\xbf"


def open_parts(config: DataConfig) -> list[Part]:
    """Find the data that `data.paths` names, in that order; the files of a folder by name.

    Raises `TrainingError` if nothing is there, it cannot be read, or it lacks a mapped column.
    """
    return [part for name in config.paths for part in _open(name, config)]


@dataclass(frozen=True, kw_only=True)
class _File:
    path: Path

    def identity(self) -> list[Any]:
        """JSON values that change when the content does: path, size and time of change."""
        try:
            status = self.path.stat()
        except OSError as error:
            raise TrainingError(f"cannot read data {self.path}: {_reason(error)}") from None
        return [str(self.path.resolve()), status.st_size, status.st_mtime_ns]


@dataclass(frozen=True, kw_only=True)
class JsonPart(_File):
    """A file with one JSON object a line; or, where `listed`, perhaps one list of objects."""

    listed: bool = False

    def rows(self) -> Iterator[Row]:
        """Objects; blank lines do not count as rows."""
        try:
            with self.path.open("rb") as file:
                if self.listed and file.read(64).removeprefix(_BOM).lstrip()[:1] == b"[":
                    file.seek(0)
                    rows = _parse(file.read())
                    if not isinstance(rows, list):
                        raise TrainingError(f"cannot read data {self.path}: {rows}")
                    for number, row in enumerate(rows, 1):
                        yield f"{self.path}:{number}", row
                    return
                file.seek(0)
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{self.path}:{number}", _parse(line)
        except OSError as error:
            raise TrainingError(f"cannot read data {self.path}: {_reason(error)}") from None


@dataclass(frozen=True, kw_only=True)
class ParquetPart(_File):
    """A Parquet file, of which these columns are read; None: all."""

    columns: tuple[str, ...] | None = None

    def rows(self) -> Iterator[Row]:
        """Objects with these columns."""
        yield from _numbered(str(self.path), self._batches(), "; is it a whole Parquet file?")

    def _batches(self) -> Iterator[Any]:
        with _library("pyarrow.parquet", "Parquet files").ParquetFile(self.path) as file:
            names = file.schema_arrow.names
            columns = names if self.columns is None else list(self.columns)
            _check_columns(str(self.path), columns, names)
            yield from file.iter_batches(_BATCH, columns=columns)


@dataclass(frozen=True, kw_only=True)
class TablePart:
    """A data set of the library `datasets`, in its memory-mapped files."""

    name: str
    table: Any

    def identity(self) -> list[Any]:
        """Name and the library's fingerprint of the content."""
        return [self.name, str(getattr(self.table, "_fingerprint", ""))]

    def rows(self) -> Iterator[Row]:
        """Objects with the mapped columns."""
        yield from _numbered(self.name, self.table.with_format("arrow").iter(_BATCH))


Part = JsonPart | ParquetPart | TablePart
"""A piece of the data that can be read by itself."""


def _open(name: str, config: DataConfig) -> list[Part]:
    path = expanded(name)
    if config.kind == "hub":
        return [_hub_part(name, config)]
    if config.kind == "jsonl":
        return [JsonPart(path=path)]
    if path.is_dir():
        return _folder_parts(path, config)
    if path.is_file():
        return [_file_part(path, config)]
    if glob.has_magic(name):
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise TrainingError(f"no file matches '{name}'")
        return [_file_part(Path(file), config) for file in found]
    if is_hub_id(name) and path.suffix not in SUFFIXES:
        return [_hub_part(name, config)]
    raise TrainingError(
        f"there is no file or folder '{name}'; give one, or the id of a data set of the hub like "
        "owner/name"
    )


def _file_part(path: Path, config: DataConfig) -> Part:
    if path.suffix == ".parquet":
        return ParquetPart(path=path, columns=config.columns.used())
    if path.suffix in SUFFIXES:
        return JsonPart(path=path, listed=path.suffix == ".json")
    raise TrainingError(
        f"'{path}' is of no known kind ({', '.join(SUFFIXES)}); if it has one JSON object a line, "
        'set data.kind = "jsonl"'
    )


def _folder_parts(folder: Path, config: DataConfig) -> list[Part]:
    """The files of a folder that name the split or none; or what `save_to_disk` wrote there."""
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        return [_saved_part(folder, config)]
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    # A .json beside others is rather a description of the data.
    files = [path for path in files if path.suffix != ".json"] or files
    if not files:
        raise TrainingError(f"the folder {folder} holds no file of kind {', '.join(SUFFIXES)}")
    wanted = _SPLITS.get(config.split, config.split)
    chosen = [path for path in files if _split_of(path.relative_to(folder)) in (None, wanted)]
    if not chosen:
        raise TrainingError(
            f"the folder {folder} holds no file of data.split '{config.split}', only "
            f"{', '.join(path.name for path in files[:8])}"
        )
    return [_file_part(path, config) for path in chosen]


def _split_of(path: Path) -> str | None:
    """The split that a file's name, or else a folder above it, names."""
    for name in (path.stem, *reversed(path.parts[:-1])):
        for word in re.split(r"[^a-z]+", name.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def _saved_part(folder: Path, config: DataConfig) -> Part:
    datasets = _library("datasets", "a folder written by save_to_disk")
    try:
        table = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library's errors share no base
        raise TrainingError(f"cannot read data {folder}: {_reason(error)}") from None
    if isinstance(table, dict):
        if config.split not in table:
            raise TrainingError(
                f"the folder {folder} has no data.split '{config.split}', only {', '.join(table)}"
            )
        table = table[config.split]
    return _table_part(str(folder), table, config)


def _hub_part(name: str, config: DataConfig) -> Part:
    datasets = _library("datasets", "data of the hub")
    options = {"name": config.subset, "split": config.split, "revision": config.revision}
    try:
        table = datasets.load_dataset(name, **options)
    except Exception as error:  # the library's errors share no base
        raise TrainingError(
            f"there is no file or folder '{name}' here, and the hub does not give split "
            f"'{config.split}' of a data set '{name}': {_reason(error).rstrip('.')}. Check the "
            "name, the network and, for private or gated data, your hub login"
        ) from None
    return _table_part(name, table, config)


def _table_part(name: str, table: Any, config: DataConfig) -> Part:
    columns = config.columns.used()
    _check_columns(name, columns, table.column_names)
    return TablePart(name=name, table=table.select_columns(list(columns)))


def _check_columns(where: str, wanted: Sequence[str], names: list[str]) -> None:
    for column in wanted:
        if column not in names:
            unknown = unknown_name("column", column, names)
            raise TrainingError(f"{where}: {unknown}. Map the columns in [data.columns]")


def _numbered(name: str, batches: Iterator[Any], hint: str = "") -> Iterator[Row]:
    """The rows of Arrow batches with their places; `hint` is put behind errors."""
    number = 0
    try:
        for batch in batches:
            for row in _batch_rows(batch):
                number += 1
                yield f"{name}:{number}", row
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
        behind = f" behind row {number}" if number else ""
        raise TrainingError(f"cannot read data {name}{behind}: {_reason(error)}{hint}") from None


def _batch_rows(batch: Any) -> Iterator[object]:
    """Rows of an Arrow batch; one whose text is not UTF-8 spoils no other."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield BadRow("not valid UTF-8")


def _parse(content: bytes) -> object:
    try:
        return json.loads(content.removeprefix(_BOM).decode("utf-8"))
    except UnicodeDecodeError:
        return BadRow("not valid UTF-8")
    except (ValueError, RecursionError):
        return BadRow("not valid JSON")


def _library(name: str, what: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)  # takes a second, so only for data that need it
    except ImportError:
        package = name.partition(".")[0]
        raise TrainingError(
            f"{what} need the package {package}: pip install 'd2f[train]'"
        ) from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)  # without the path, said already
