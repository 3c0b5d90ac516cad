"""Types of tensors in a GGUF: plain numbers, and quantised blocks of numbers.

Plain numbers are read here. The PyPI package `gguf` dequantises blocks; it is imported when the
first block is met.
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
    """The format in which the numbers of a tensor are stored."""

    name: str
    values: int
    """Numbers in a block."""
    bytes: int
    """Bytes of a block."""
    kind: str
    """Type of the numbers after reading, by its name in safetensors."""


_PLAIN = {
    number: BlockType(name=name, values=1, bytes=size, kind=name)
    for number, name, size in ((0, "F32", 4), (1, "F16", 2), (28, "F64", 8), (30, "BF16", 2))
}
"""Types of plain numbers by their numbers in a GGUF."""


def block_type(number: int, where: str) -> BlockType:
    """Return the block type with a number.

    Args:
        number: The type's number in the header of a GGUF.
        where: The tensor of this type, as error messages name it.

    Raises:
        CheckpointError: The type is unknown or cannot be dequantised, or the package `gguf` is not
            installed.

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
    """Return a type of the package `gguf`, or the name of a type that it cannot dequantise."""
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
    """Dequantise rows of blocks: bytes (n, b) become float32 numbers (n, v)."""
    package = _package()
    return package.dequantize(rows, package.GGMLQuantizationType[kind.name])


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise CheckpointError(_NEEDED) from None
    return gguf
