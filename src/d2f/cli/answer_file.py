"""The output file of `d2f generate --input`, to which an interrupted run can append later.

A line is written as soon as its answer is finished, whatever its row. When all answers are there,
the lines are sorted into the order of the input. A second file, `NAME.settings`, records the
settings that produced the answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2f.errors import ConfigError, D2FError, counted
from d2f.evaluation.results import differences, plain, write_json

_FARTHEST = 10_000_000
"""Most answers between one and all others; a line that is further off was not written by a run."""
_REMEDY = "name another --output, or start afresh with --fresh"


@dataclass
class Totals:
    """Sums over the answers in a file."""

    answers: int = 0
    tokens: int = 0
    forwards: int = 0
    cut: int = 0
    """Answers that ended because they reached their limit of tokens."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a line to the sums."""
        tokens, forwards = record["num_tokens"], record["num_forwards"]
        self.cut += record["finish_reason"] == "length"
        self.answers += 1
        self.tokens += tokens
        self.forwards += forwards


class AnswerFile:
    """A file of answers, one line for each row and sample.

    It is created if need be, and locked by this process until `close`. `settings` is everything
    that the answers depend on; a file with answers of other settings is refused, unless `fresh`
    deletes them.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], *, num_samples: int = 1, fresh: bool = False
    ) -> None:
        self.path = path
        self._real = path.resolve()
        self._settings_path = self._real.with_name(self._real.name + ".settings")
        self._settings, self._num_samples = settings, num_samples
        self.totals = Totals()
        self._places = array("q")
        """The place in the file + 1 of each answer, by its key; 0: it has none."""
        self._foreign = False
        """Whether lines of other kinds are among the answers."""
        self._size = 0
        self._file = self._open()
        try:
            if fresh:
                self._settings_path.unlink(missing_ok=True)
                os.ftruncate(self._file, 0)
            self.about = self._agree()
            """The facts that an earlier run passed to `begin`; empty for a new file."""
            self._read()
        except BaseException:
            self.close()
            raise

    def has(self, row: int, sample: int = 0) -> bool:
        """Return whether the file has an answer."""
        key = self._key(row, sample)
        return key < len(self._places) and bool(self._places[key])

    def begin(self, about: Mapping[str, Any]) -> None:
        """Write the file of settings, before the first answer."""
        if self.about:
            return
        try:
            write_json(self._settings_path, {"settings": self._settings, "about": about})
        except OSError as error:
            raise D2FError(f"cannot write {self._settings_path}: {error.strerror}") from None

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append answers; if the disk is full, append none of them."""
        records = list(records)
        lines = [_line(record) for record in records]
        data = memoryview(b"".join(lines))
        try:
            # On a disk that becomes full, the first call writes a part and the next one fails.
            while data:
                data = data[os.write(self._file, data) :]
        except BaseException as error:
            # Cut off the part of a line, to which the next line would be joined.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            if isinstance(error, OSError):
                raise D2FError(
                    f"cannot write {self.path}: {error.strerror}; "
                    f"{counted(self.totals.answers, 'answer', ',')} are kept; make room, and go "
                    "on with the same command"
                ) from None
            raise
        for line, record in zip(lines, records, strict=True):
            self._note(record, len(line))

    def finish(self) -> None:
        """Sort the lines into the order of the input, and flush them to the disk."""
        places = [place for place in self._places if place]
        try:
            if self._foreign or places != sorted(places):
                self._rewrite(places)
            else:
                os.fsync(self._file)
        except OSError as error:
            raise D2FError(
                f"cannot put {self.path} into the order of the input: {error.strerror}; all "
                "answers are in it; make room, and give the same command again"
            ) from None

    def close(self) -> None:
        """Close the file, so that other processes may write to it."""
        os.close(self._file)

    def _key(self, row: int, sample: int) -> int:
        return row * self._num_samples + sample

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            file = os.open(self._real, flags, 0o666)
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error.strerror}") from None
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise ConfigError(f"cannot write {self.path}: it is no file, so no run can go on")
            self._lock(file)
        except BaseException:
            os.close(file)
            raise
        return file

    def _lock(self, file: int) -> None:
        """Lock the file against other processes, which would append the same answers."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another d2f generate writes to {self.path}; wait for it, or name another --output"
            ) from None
        except OSError:
            pass  # the file system has no locks

    def _agree(self) -> dict[str, Any]:
        """Return the facts about existing answers; refuse answers of other settings."""
        if os.fstat(self._file).st_size == 0:
            return {}
        try:
            known = json.loads(self._settings_path.read_text(encoding="utf-8"))
            before, about = dict(known["settings"]), dict(known["about"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{self.path} is there already, and {self._settings_path.name}, which would say "
                f"how it came about, cannot be read; {_REMEDY}"
            ) from None
        differ = differences(before, self._settings)
        if differ:
            raise ConfigError(f"{self.path} has answers of other settings: {differ}; {_REMEDY}")
        return about

    def _read(self) -> None:
        """Count the answers in the file, and cut off an unfinished line that a crash left."""
        with self._real.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    os.ftruncate(self._file, self._size)
                    break
                try:
                    self._note(json.loads(line), len(line))
                except (ValueError, KeyError, TypeError):
                    # The line was not written by a run, or was damaged by a crash.
                    self._size += len(line)
                    self._foreign = True

    def _note(self, record: Mapping[str, Any], length: int) -> None:
        """Count a record as the last line of the file."""
        row, sample = record["row"], record.get("sample", 0)
        numbers = type(row) is int and type(sample) is int
        if not numbers or row < 0 or not 0 <= sample < self._num_samples:
            raise ValueError(f"row {row!r}, sample {sample!r}")
        if self._key(row, sample) > len(self._places) + _FARTHEST:
            raise ValueError(f"row {row} is far from all others")
        if self.has(row, sample):
            raise ValueError(f"a second answer to row {row}")
        self.totals.add(record)
        key = self._key(row, sample)
        if key >= len(self._places):
            self._places.frombytes(bytes(8 * (key + 1 - len(self._places))))
        self._places[key] = self._size + 1
        self._size += length

    def _rewrite(self, places: Iterable[int]) -> None:
        part = self._real.with_name(self._real.name + ".part")
        try:
            with self._real.open("rb") as source, part.open("wb") as target:
                for place in places:
                    source.seek(place - 1)
                    target.write(source.readline())
                target.flush()
                os.fsync(target.fileno())
            shutil.copymode(self._real, part)
            os.replace(part, self._real)
        except BaseException:
            part.unlink(missing_ok=True)  # a full disk needs its room
            raise


def _line(record: Mapping[str, Any]) -> bytes:
    """Return a record as a line of JSON, which has no nan: one in a column of Parquet is null."""
    text = json.dumps(plain(record), ensure_ascii=False, default=str)
    # Half of a surrogate pair cannot be written as UTF-8; its escape is JSON's own.
    return text.encode(errors="backslashreplace") + b"\n"
