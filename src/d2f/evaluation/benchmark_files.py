"""Read the rows of a benchmark from a local folder of its public files.

The files are those that the benchmarks' authors publish (JSON lines, plain or gzipped). The hub
holds the same rows in other containers and with other names of splits.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2f.errors import ConfigError, counted
from d2f.hub import expanded

DataRow = dict[str, Any]

MBPP_SPLITS: Mapping[str, range] = {
    "prompt": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
}
"""The `task_id`s of each split of MBPP, as its authors cut the one file."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """The names of a benchmark's files, and the columns of their rows."""

    folder: str
    """Below the data folder; files that lie in the data folder itself are found too."""
    splits: Mapping[str, str]
    """The file of each split; `.gz` may follow."""
    texts: tuple[str, ...]
    """Columns of text."""
    optional: tuple[str, ...] = ()
    """Columns of text that are kept if the first row has them."""
    lists: Mapping[str, int] = field(default_factory=dict)
    """Columns of lists of texts, each with the fewest texts that it may hold."""
    origin: str = ""
    """The source of the files, for users who lack them."""


_TEXT_TO_SQL = """the file holds one JSON object a line, made from the collection text2sql-data \
(github.com/jkkummerfeld/text2sql-data, question splits) with its variables filled in"""


def _text_to_sql(name: str, lists: Mapping[str, int]) -> Files:
    return Files(
        folder="text2sql",
        splits={split: f"{name}.{split}.jsonl" for split in ("train", "validation", "test")},
        texts=("question", "sql"),
        lists=lists,
        origin=_TEXT_TO_SQL,
    )


_GSM8K = Files(
    folder="gsm8k",
    splits={"train": "train.jsonl", "test": "test.jsonl"},
    texts=("question", "answer"),
)
FILES: Mapping[str, Files] = {
    "gsm8k": _GSM8K,
    "gsm8k_cot": _GSM8K,
    "minerva_math": Files(
        folder="math",
        splits={"train": "train.jsonl", "test": "test.jsonl"},
        texts=("problem", "solution"),
        optional=("unique_id",),
    ),
    "minerva_math500": Files(
        folder="math",
        splits={"test": "math500.jsonl"},
        texts=("problem", "solution"),
        optional=("unique_id",),
    ),
    "humaneval": Files(
        folder="humaneval",
        splits={"test": "HumanEval.jsonl"},
        texts=("task_id", "prompt", "canonical_solution", "test", "entry_point"),
    ),
    "mbpp": Files(
        folder="mbpp",
        splits=dict.fromkeys(MBPP_SPLITS, "mbpp.jsonl"),
        texts=("text", "code"),
        optional=("test_setup_code",),
        lists={"test_list": 3},
    ),
    "advising": _text_to_sql("advising", {}),
    "wikisql": _text_to_sql("wikisql", {"columns": 1}),
}
"""Files of each task."""


def read_split(task: str, split: str, data: str | Path) -> list[tuple[str, DataRow]]:
    """Read the rows of one split, each with `file:line`; only the task's columns are kept.

    Args:
        task: A name of `FILES`.
        split: As the hub calls it.
        data: The folder of the files.

    Raises:
        ConfigError: The folder or the file is missing or broken, holds no row, or a row is not as
            it should be; the message names the file and the line.

    Example:
        `read_split("gsm8k", "test", "data")` reads data/gsm8k/test.jsonl.
    """
    files = FILES[task]
    file = _find(task, files, files.splits[split], expanded(data))
    rows = [(where, row) for where, row in _read(file) if _check(where, row, files, task)]
    if not rows:
        raise ConfigError(f"{file} holds no rows")
    if task == "mbpp":
        known = MBPP_SPLITS[split]
        rows = [(where, row) for where, row in rows if row["task_id"] in known]
        if not rows:
            raise ConfigError(
                f"{file} holds nothing of the split '{split}' of mbpp: no task_id from "
                f"{known.start} to {known.stop - 1}"
            )
    keep = [*files.texts, *(name for name in files.optional if name in rows[0][1])]
    keep += ["task_id"] if task == "mbpp" else []
    keep += files.lists
    return [(where, {name: row.get(name) for name in keep}) for where, row in rows]


def _find(task: str, files: Files, name: str, data: Path) -> Path:
    if not data.is_dir():
        kind = "is a file, not a folder" if data.exists() else "does not exist"
        raise ConfigError(
            f"the data folder {data} {kind}; name the folder that holds {files.folder}/{name}"
        )
    for folder in (data / files.folder, data):
        for file in (folder / name, folder / f"{name}.gz"):
            if file.is_file():
                return file
    more = f"; {files.origin}" if files.origin else ""
    if task == "minerva_math":
        more = "; for the 500 problems of math500.jsonl the task is minerva_math500"
    raise ConfigError(
        f"the data folder {data} has no {files.folder}/{name} (or {name}.gz), which the task "
        f"{task} reads{more}"
    )


def _read(file: Path) -> Iterator[tuple[str, Any]]:
    opened = gzip.open if file.suffix == ".gz" else open
    number = 0
    try:
        with opened(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{file}:{number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                    raise ConfigError(f"{where}: not valid JSON: {error}") from None
                yield where, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(
            f"{file} is broken after line {number} ({error}); fetch the file again"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from None


def _check(where: str, row: object, files: Files, task: str) -> bool:
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: expected a JSON object, not {type(row).__name__}")
    for name in files.texts:
        if not isinstance(row.get(name), str):
            raise ConfigError(f"{where}: expected a text in the column '{name}'{_has(row)}")
    for name in (*files.texts, *files.optional):
        value = row.get(name)
        if value is not None and not _storable(value):
            raise ConfigError(
                f"{where}: the column '{name}' holds {_shown(value)}, which is no text of Unicode"
            )
    number = row.get("task_id")
    if task == "mbpp" and (not isinstance(number, int) or isinstance(number, bool)):
        raise ConfigError(f"{where}: expected a whole number in the column 'task_id'{_has(row)}")
    for name, least in files.lists.items():
        texts = row.get(name)
        if not (isinstance(texts, list) and len(texts) >= least and all(map(_storable, texts))):
            raise ConfigError(
                f"{where}: expected a list of at least {counted(least, 'text')} in the column "
                f"'{name}'{_has(row)}"
            )
    return True


def _storable(value: object) -> bool:
    """Tell whether a value is a text that UTF-8 can hold; JSON may have half a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _has(row: Mapping[str, Any]) -> str:
    return f"; the row has {', '.join(map(str, row)) or 'no columns'}"
