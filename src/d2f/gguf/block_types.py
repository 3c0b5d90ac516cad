"""Types of tensors in a GGUF: plain numbers, and quantised blocks of them.

Plain numbers are read here; for the rest there is the package `gguf`, imported at the first block.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2f.errors import CheckpointError

_NEEDED = "quantised GGUF files need the package gguf: pip install 'd2f[gguf]'"


@dataclass(frozen=True, kw_only=True)
class BlockType:
    """How the numbers of a tensor are stored."""

    name: str
    values: int
    """Numbers in a block."""
    bytes: int
    """Bytes of a block."""
    kind: str
    """Type of the numbers when they are read, as safetensors names it."""


_PLAIN = {
    0: BlockType(name="F32", values=1, bytes=4, kind="F32"),
    1: BlockType(name="F16", values=1, bytes=2, kind="F16"),
    28: BlockType(name="F64", values=1, bytes=8, kind="F64"),
    30: BlockType(name="BF16", values=1, bytes=2, kind="BF16"),
}
"""By their numbers in a GGUF."""
PLAIN_NAMES = frozenset(plain.name for plain in _PLAIN.values())


def block_type(number: int, where: str) -> BlockType:
    """The type of a number in a GGUF.

    Args:
        number: As the header has it.
        where: What has this type, for the error.

    Raises:
        CheckpointError: It is unknown or cannot be turned into numbers, or `gguf` is missing.

    Example:
        >>> block_type(30, "model.gguf: tensor output.weight").name
        'BF16'
    """
    if number in _PLAIN:
        return _PLAIN[number]
    found = _quantised(number)
    if isinstance(found, BlockType):
        return found
    raise CheckpointError(
        f"{where} is of block type {found}, which the package gguf here does not dequantise; "
        "update it (pip install -U gguf), or take the model in another type, such as Q8_0 or F16"
    )


@functools.cache
def _quantised(number: int) -> BlockType | str:
    """A type of the package `gguf`; the name of one that it cannot turn into numbers."""
    package = _package()
    try:
        known = package.GGMLQuantizationType(number)
    except ValueError:
        return str(number)
    values, size = package.GGML_QUANT_SIZES[known]
    found = BlockType(name=known.name, values=values, bytes=size, kind="F32")
    try:
        dequantise(np.zeros((1, size), dtype=np.uint8), found)
    except NotImplementedError:
        return known.name
    return found


def dequantise(rows: np.ndarray[Any, Any], kind: BlockType) -> np.ndarray[Any, Any]:
    """The numbers in rows of quantised blocks: bytes (n, b) become float32 (n, v)."""
    package = _package()
    return package.dequantize(rows, package.GGMLQuantizationType[kind.name])


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise CheckpointError(_NEEDED) from None
    return gguf
