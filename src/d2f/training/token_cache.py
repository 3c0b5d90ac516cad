"""Token ids of all samples, in flat arrays: in memory, or mapped from a file of the cache.

The cache holds one file for each way to encode data, so that they are encoded once. A file holds
the tokens, the lengths of prompts and of responses, all 32-bit, then a JSON object that describes
them, the size of that object and a mark. It is written beside its place and then renamed. It is
used only if its key, its sizes and its check sum are right.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2f.training.pairs import BadRows


@dataclass(kw_only=True)
class Encoded:
    """Token ids of samples, one after the other, and the lengths to cut them up again."""

    tokens: array[int] | memoryview = field(default_factory=lambda: array("i"))
    prompt_lengths: array[int] = field(default_factory=lambda: array("i"))
    response_lengths: array[int] = field(default_factory=lambda: array("i"))
    bad_rows: BadRows = field(default_factory=BadRows)
    """Rows that gave no sample."""
    cache_file: str | None = field(default=None, compare=False)
    """The file that `tokens` are mapped from."""

    def add(self, prompt_ids: list[int], response_ids: list[int]) -> None:
        """Append a sample."""
        assert isinstance(self.tokens, array)
        self.tokens.extend(prompt_ids)
        self.tokens.extend(response_ids)
        self.prompt_lengths.append(len(prompt_ids))
        self.response_lengths.append(len(response_ids))

    def extend(self, other: Encoded) -> None:
        """Append another batch of samples."""
        assert isinstance(self.tokens, array)
        self.tokens.extend(other.tokens)
        self.prompt_lengths.extend(other.prompt_lengths)
        self.response_lengths.extend(other.response_lengths)


Sample = tuple[list[int], list[int]]
"""Ids of the prompt and of the response."""

_MARK = b"d2ftok01"
_ITEM = array("i").itemsize


def cache_file(setting: str | bool, key: list[Any]) -> Path | None:
    """Name the file that `data.cache` has for a key of JSON values; None where it keeps nothing."""
    if not setting:
        return None
    named = setting if isinstance(setting, str) else os.environ.get("D2F_CACHE", "")
    text = json.dumps([_MARK.decode(), *key], sort_keys=True)
    name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return Path(named or "~/.cache/d2f").expanduser() / f"{name}.tokens"


def read_cache(file: Path) -> Encoded | None:
    """Map a file's tokens; None if it is not there, is damaged or something else.

    The lengths are read into memory, the tokens only as they are needed.
    """
    try:
        with file.open("rb") as stream:
            # Copy on write: torch wants memory that could be written to.
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError):
        return None
    tail = len(_MARK) + 8
    size = len(mapped) - tail - int.from_bytes(mapped[-tail : -len(_MARK)], "little")
    if mapped[-len(_MARK) :] != _MARK or size < 0:
        return None
    try:
        about = json.loads(mapped[size:-tail])
        num_tokens, num_samples = int(about["tokens"]), int(about["samples"])
        bad = about["bad_rows"]
        bad_rows = BadRows(counts=dict(bad["counts"]), first=dict(bad["first"]))
        check_sum = zlib.crc32(memoryview(mapped)[:size])
        wanted = (file.stem, _ITEM * (num_tokens + 2 * num_samples), check_sum)
        if (about["key"], size, about["crc"]) != wanted:
            return None
    except (KeyError, TypeError, ValueError):
        return None
    view = memoryview(mapped)[:size].cast("i")
    split = num_tokens + num_samples
    return Encoded(
        tokens=view[:num_tokens],
        prompt_lengths=array("i", view[num_tokens:split].tobytes()),
        response_lengths=array("i", view[split:].tobytes()),
        bad_rows=bad_rows,
        cache_file=str(file),
    )


def write_cache(file: Path, samples: Callable[[BadRows], Iterator[Sample]]) -> None:
    """Encode into a file; of all samples only the lengths are in memory.

    The file's folder is created. `samples` fills the bad rows while they are read. Raises `OSError`
    where the folder cannot be written to, or is full; nothing is left behind.
    """
    bad_rows = BadRows()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.stem}.{os.getpid()}.part")
    prompt_lengths, response_lengths = array("i"), array("i")
    num_tokens = crc = 0
    try:
        with part.open("wb") as stream:

            def put(values: array[int]) -> None:
                nonlocal crc
                content = values.tobytes()
                crc = zlib.crc32(content, crc)
                stream.write(content)

            for prompt_ids, response_ids in samples(bad_rows):
                put(array("i", [*prompt_ids, *response_ids]))
                prompt_lengths.append(len(prompt_ids))
                response_lengths.append(len(response_ids))
                num_tokens += len(prompt_ids) + len(response_ids)
            put(prompt_lengths)
            put(response_lengths)
            about = {
                "key": file.stem,
                "tokens": num_tokens,
                "samples": len(prompt_lengths),
                "crc": crc,
                "bad_rows": bad_rows.to_table(),
            }
            text = json.dumps(about).encode()
            stream.write(text + len(text).to_bytes(8, "little") + _MARK)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
