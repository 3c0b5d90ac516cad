"""Keep the files of one row's results, which an interrupted run goes on with.

`problems.jsonl` has a line for each scored problem and `speed.jsonl` one for each problem and
round, appended as they come; `settings.json` says how they came about, so that a later run can tell
whether it may add to them; `summary.json` comes last.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from d2f.errors import ConfigError

METHODS: Mapping[str, str] = {
    "autoregressive": "autoregressive",
    "vanilla": "vanilla",
    "vanilla-eos-stop": "vanilla",
    "vanilla-512": "vanilla",
    "dllm-cache": "dllm-cache",
    "fast-dllm-parallel": "parallel",
    "fast-dllm-prefix": "prefix-cache",
    "fast-dllm-dual": "dual-cache",
    "undistilled": "pipelined",
    "serial": "serial",
    "pipelined": "pipelined",
    "control": "vanilla",
}
"""The methods that tables know, in the order of their rows, each with its strategy."""
EXPERIMENTS = ("methods", "thresholds", "steps", "noise", "control", "block-size", "batch")
"""The question that rows answer together; each has tables of its own in a report."""
FRESH = "give another --output, or start afresh with --fresh"
_COUNTS = ("index", "correct", "num_tokens", "num_forwards", "num_query_tokens", "seconds")
_NEEDED = (*_COUNTS, "prompt_sha256", "gold_sha256", "metrics", "error")
_SPEED_NEEDED = (*_COUNTS, "round", "decode_tokens", "decode_seconds")

Record = dict[str, Any]


class RowFolder:
    """The folder of a row's results; it is made, and belongs to this process.

    Raises:
        ConfigError: Another process writes there.
        OSError: The folder cannot be made or written.

    Example:
        >>> import tempfile
        >>> folder = RowFolder(Path(tempfile.mkdtemp()) / "serial")
        >>> folder.problems()
        {}
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._settings, self._problems, self._speed, self._summary = (
            path / name
            for name in ("settings.json", "problems.jsonl", "speed.jsonl", "summary.json")
        )
        self._lock()

    def _lock(self) -> None:
        """Keep other processes out, which would append the same problems again."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        file = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        weakref.finalize(self, os.close, file)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ConfigError(
                    f"another d2f eval writes to {self.path}; wait for it, or give another --output"
                ) from None
            # A file system that knows no locks.

    def clear(self) -> None:
        """Forget all results."""
        for path in (self._summary, self._problems, self._speed, self._settings):
            path.unlink(missing_ok=True)

    def settings(self, part: str) -> Record | None:
        """Read the settings of a part: `answers`, `score`, `speed` or `environment`.

        Raises:
            ConfigError: The file is broken.
        """
        return self._all_settings().get(part)

    def note_settings(self, part: str, settings: Mapping[str, Any]) -> None:
        """Note the settings of a part, before the first of its results."""
        write_json(self._settings, self._all_settings() | {part: settings})

    def require_same(self, part: str, settings: Mapping[str, Any]) -> None:
        """Refuse to add to results of other settings.

        Raises:
            ConfigError: They did; names what differs.
        """
        if not (self.problems() or self.speed()):
            return
        known = self.settings(part)
        if known is None and part == "answers":
            raise ConfigError(f"{self.path} has results but no settings.json; {FRESH}")
        differ = "" if known is None else differences(known, settings)
        if differ:
            raise ConfigError(f"{self.path} has results of other settings: {differ}; {FRESH}")

    def problems(self) -> dict[int, Record]:
        """Read the scored problems by index."""
        found: dict[int, Record] = {}
        for record in read_lines(self._problems, _NEEDED):
            found.setdefault(record["index"], record)
        return found

    def mend_problems(self) -> dict[int, Record]:
        """Read the scored problems, and take lines that a crash cut short out of the file."""
        found = self.problems()
        write_lines(self._problems, found.values())
        return found

    def add_problems(self, records: Iterable[Record]) -> None:
        """Append scored problems; they are on the disk on return."""
        append_lines(self._problems, records)

    def speed(self) -> list[Record]:
        """Read the timed problems of all rounds."""
        return read_lines(self._speed, _SPEED_NEEDED)

    def keep_speed(self, records: Iterable[Record]) -> None:
        """Keep these timed problems only."""
        write_lines(self._speed, records)

    def add_speed(self, records: Iterable[Record]) -> None:
        """Append a round; it is on the disk on return."""
        append_lines(self._speed, records)

    def write_summary(self, summary: Mapping[str, Any]) -> Record:
        """Write the summary, and return it as it can be read back."""
        write_json(self._summary, summary)
        return plain(summary)

    def _all_settings(self) -> Record:
        path = self._settings
        if not path.exists():
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} cannot be read as JSON: {error}; {FRESH}") from None
        if not isinstance(content, dict):
            raise ConfigError(f"{path} holds no table; {FRESH}")
        return content


def differences(known: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Say which settings differ from those read from a file; empty where none does.

    Example:
        >>> differences({"seed": 0, "stop": []}, {"seed": 1, "stop": ()})
        'seed was 0, now 1'
    """
    wanted = plain(settings)
    return "; ".join(
        f"{name} was {_short(known.get(name))}, now {_short(wanted.get(name))}"
        for name in dict.fromkeys([*known, *wanted])
        if known.get(name) != wanted.get(name)
    )


def check_writable(path: Path) -> None:
    """See whether a folder can be made or written, and leave it as it is.

    Raises:
        ConfigError: It cannot.
    """
    there = next(part for part in (path, *path.absolute().parents) if part.exists())
    if not there.is_dir():
        raise ConfigError(f"the output {path} cannot be a folder: {there} is a file")
    if not os.access(there, os.W_OK):
        raise ConfigError(f"the output {path} cannot be written: {there} is read-only for you")


def read_lines(path: Path, needed: Iterable[str]) -> list[Record]:
    """Read the whole lines of a JSONL file that have the needed keys; leave out a torn one."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and all(name in record for name in needed):
            found.append(record)
    return found


def append_lines(path: Path, records: Iterable[Record]) -> None:
    """Append records to a JSONL file in one piece; they are on the disk on return."""
    data = memoryview("".join(_line(record) for record in records).encode())
    # Unbuffered: an interrupt comes before or after, not amid a line.
    with path.open("ab", buffering=0) as file:
        start = os.fstat(file.fileno()).st_size
        try:
            # A disk that runs full takes a part first and raises at the next call.
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except BaseException as error:
            with contextlib.suppress(OSError):
                file.truncate(start)
            _name_file(error, path)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)  # it takes room that a full disk needs
        _name_file(error, path)
        raise


def write_lines(path: Path, records: Iterable[Record]) -> None:
    """Write a JSONL file whole or not at all."""
    write_text(path, "".join(_line(record) for record in records))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all; nan becomes null."""
    write_text(path, json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Convert a value to JSON's own types: tuples to lists, what is no finite number to null.

    Example:
        >>> plain({"a": (1, float("nan"))})
        {'a': [1, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _line(record: Record) -> str:
    return json.dumps(plain(record), allow_nan=False) + "\n"


def _name_file(error: BaseException, path: Path) -> None:
    """Let an error of the disk say which file it met; writing itself does not."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"
