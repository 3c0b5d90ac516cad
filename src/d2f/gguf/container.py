"""The header of a GGUF: the metadata, and the tensors with their places in the file."""

from __future__ import annotations

import math
import mmap
import reprlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2f.errors import CheckpointError
from d2f.gguf.block_types import BlockType, block_type

MAGIC = b"GGUF"
_OLD_MAGICS = (b"lmgg", b"fmgg", b"tjgg", b"algg")
_VERSIONS = (2, 3)
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""Number of a metadata type -> its letter in the module `struct`."""
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_AGAIN = "download it again"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(holds, value))


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "a text": (
        _is_text,
        "general.architecture general.type tokenizer.chat_template tokenizer.ggml.model"
        " tokenizer.ggml.pre LAYOUT.rope.scaling.type",
    ),
    "a number": (
        _is_number,
        "split.count split.no LAYOUT.attention.layer_norm_rms_epsilon LAYOUT.rope.freq_base"
        " LAYOUT.attention.sliding_window LAYOUT.rope.scale_linear LAYOUT.rope.scaling.factor"
        " LAYOUT.rope.scaling.low_freq_factor LAYOUT.rope.scaling.high_freq_factor"
        " LAYOUT.rope.scaling.original_context_length",
    ),
    "a list of texts": (_list_of(_is_text), "tokenizer.ggml.tokens tokenizer.ggml.merges"),
    "a list of numbers": (
        _list_of(_is_number),
        "tokenizer.ggml.token_type tokenizer.ggml.scores",
    ),
}
"""Type -> its check, and the metadata entries of this type, but for sizes and token ids, which must
be whole numbers and are checked where they are read. LAYOUT is the layout's name, such as llama."""


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """A tensor's place in a GGUF, its shape and its block type."""

    file: Path
    name: str
    """Name of the tensor in the file."""
    shape: tuple[int, ...]
    """Sizes in torch's order, rows first."""
    type: BlockType
    offset: int
    """Position in the file at which the tensor's bytes begin."""

    @property
    def num_values(self) -> int:
        """Count of the tensor's numbers."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Count of bytes that the tensor takes in the file."""
        return self.num_values // self.type.values * self.type.bytes


@dataclass(frozen=True, kw_only=True)
class Container:
    """The header of a GGUF."""

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    """Tensors by their names in the file."""


def is_gguf(file: Path) -> bool:
    """Return whether a file is a GGUF, by the end of its name or by its first bytes."""
    if file.suffix.lower() == ".gguf":
        return True
    try:
        with file.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_container(file: Path) -> Container:
    """Read the header of a GGUF and check that the file holds all its tensors.

    Raises:
        CheckpointError: The file is not a GGUF, is cut short, is one part of several, or has an
            unsupported byte order, version or block type; or the package `gguf` is needed and not
            installed.
    """
    try:
        with file.open("rb") as stream:
            if stream.seek(0, 2) < 24:
                stream.seek(0)
                _check_magic(file, stream.read(len(MAGIC)))
                raise CheckpointError(f"{file} is cut short: it ends in its header; {_AGAIN}")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _parse(file, mapped)
    except RecursionError:
        raise CheckpointError(
            f"{file} is damaged: its metadata nest too deeply; {_AGAIN}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None


def _check_magic(file: Path, head: bytes) -> None:
    if head == MAGIC:
        return
    if head in _OLD_MAGICS:
        raise CheckpointError(
            f"{file} is of the format before GGUF ({head[::-1].decode()}); convert the original "
            "model to GGUF with a llama.cpp of today"
        )
    what = f"it begins with {head!r}, not {MAGIC!r}" if head else "it is empty"
    raise CheckpointError(f"{file} is no GGUF: {what}; give a GGUF, or a model's folder or hub id")


def _parse(file: Path, mapped: mmap.mmap) -> Container:
    _check_magic(file, mapped[:4])
    cursor = _Cursor(file, mapped)
    _check_version(file, cursor.scalar("I"))
    num_tensors, num_entries = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        name = cursor.text()
        metadata[name] = cursor.value(cursor.scalar("I"))
    _check_types(file, metadata)
    parts = metadata.get("split.count", 1)
    if parts > 1:
        raise CheckpointError(
            f"{file} is part {metadata.get('split.no', 0) + 1} of {parts}; put the parts together "
            "(llama-gguf-split --merge FIRST_PART WHOLE) and give the whole"
        )
    listed = [_tensor(file, cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 1:
        raise CheckpointError(f"{file}: general.alignment is {alignment!r}; {_AGAIN}")
    start = -(-cursor.position // alignment) * alignment
    tensors = {
        name: GGUFTensor(file=file, name=name, shape=shape, type=kind, offset=start + offset)
        for name, shape, kind, offset in listed
    }
    if len(tensors) < len(listed):
        raise CheckpointError(f"{file} names a tensor twice; {_AGAIN}")
    end = max((tensor.offset + tensor.num_bytes for tensor in tensors.values()), default=0)
    if end > len(mapped):
        raise CheckpointError(
            f"{file} is cut short: its tensors end at byte {end:,}, and it has {len(mapped):,}; "
            f"{_AGAIN}"
        )
    return Container(file=file, metadata=metadata, tensors=tensors)


def _check_types(file: Path, metadata: dict[str, Any]) -> None:
    layout = str(metadata.get("general.architecture"))
    for kind, (holds, names) in _KINDS.items():
        for name in names.replace("LAYOUT", layout).split():
            if name in metadata and not holds(metadata[name]):
                raise CheckpointError(
                    f"{file} is damaged: {name} is {reprlib.repr(metadata[name])}, not {kind}; "
                    "download it again, or convert the original model again"
                )


def _check_version(file: Path, version: int) -> None:
    if version in _VERSIONS:
        return
    if version and version & 0xFFFF == 0:
        raise CheckpointError(
            f"{file} is a big-endian GGUF; only little-endian ones are read, so convert it with "
            "the script gguf-convert-endian of the package gguf"
        )
    remedy = (
        "convert the original model again with a llama.cpp of today"
        if version < min(_VERSIONS)
        else "update d2f, or convert the model with an older llama.cpp"
    )
    raise CheckpointError(
        f"{file} is of GGUF version {version}; versions {_VERSIONS[0]} and {_VERSIONS[1]} are "
        f"read, so {remedy}"
    )


def _tensor(file: Path, cursor: _Cursor) -> tuple[str, tuple[int, ...], BlockType, int]:
    name = cursor.text()
    dimensions = cursor.scalar("I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise CheckpointError(f"{file}: tensor {name} has {dimensions} dimensions; {_AGAIN}")
    shape = tuple(reversed(cursor.scalars("Q", dimensions)))
    kind = block_type(cursor.scalar("I"), f"{file}: tensor {name}")
    if shape[-1] % kind.values:
        raise CheckpointError(
            f"{file}: the rows of tensor {name} hold {shape[-1]} values, which blocks of "
            f"{kind.values} ({kind.name}) cannot; {_AGAIN}"
        )
    return name, shape, kind, cursor.scalar("Q")


class _Cursor:
    """Reads the values of a header one after the other."""

    def __init__(self, file: Path, mapped: mmap.mmap) -> None:
        self.file, self.mapped, self.position = file, mapped, 4

    def scalar(self, letter: str) -> Any:
        return self.scalars(letter, 1)[0]

    def scalars(self, letter: str, count: int) -> tuple[Any, ...]:
        layout = f"<{count}{letter}"
        start = self._skip(count * struct.calcsize("<" + letter))
        return struct.unpack_from(layout, self.mapped, start)

    def text(self) -> str:
        size = self.scalar("Q")
        start = self._skip(size)
        try:
            return self.mapped[start : start + size].decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(
                f"{self.file} is damaged: a text at byte {start:,} is no UTF-8; {_AGAIN}"
            ) from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            if inner in _SCALARS:
                return list(self.scalars(_SCALARS[inner], count))
            self._skip(count, move=False)  # each entry takes at least one byte
            return [self.value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise CheckpointError(
                f"{self.file} is damaged: metadata of type {kind} at byte {self.position:,}; "
                f"{_AGAIN}"
            )
        return self.scalar(_SCALARS[kind])

    def _skip(self, size: int, *, move: bool = True) -> int:
        start = self.position
        if start + size > len(self.mapped):
            raise CheckpointError(
                f"{self.file} is cut short: its header goes on at byte {start:,}, and it has "
                f"{len(self.mapped):,}; {_AGAIN}"
            )
        self.position += size if move else 0
        return start
