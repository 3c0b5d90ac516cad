"""Read the numbers of a tensor from a GGUF onto a device, part by part."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2f.gguf.block_types import PLAIN_NAMES, dequantise
from d2f.gguf.container import GGUFTensor
from d2f.gguf.layouts import HubTensor

_PART = 1 << 22
"""Count of numbers that are dequantised at once."""
_NUMPY = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": np.int16}


def read_values(tensor: HubTensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor on `device`; host memory holds a few million numbers of it at a time."""
    source = tensor.source
    values = torch.empty(source.shape, dtype=dtype, device=device)
    rows = values.view(-1, source.shape[-1])
    # Copy-on-write, though nothing writes: torch warns of memory that is read-only.
    stored = np.memmap(
        source.file,
        mode="c",
        offset=source.offset,
        shape=(len(rows), source.num_bytes // len(rows)),
    )
    step = max(1, _PART // source.shape[-1])
    for start in range(0, len(rows), step):
        rows[start : start + step] = _numbers(np.asarray(stored[start : start + step]), source)
    return values if tensor.interleaved_heads is None else _paired(values, tensor.interleaved_heads)


def _numbers(stored: np.ndarray[Any, Any], source: GGUFTensor) -> Tensor:
    name = source.type.name
    if name not in PLAIN_NAMES:
        return torch.from_numpy(dequantise(stored, source.type))
    numbers = torch.from_numpy(stored.view(_NUMPY[name]))
    return numbers.view(torch.bfloat16) if name == "BF16" else numbers


def _paired(values: Tensor, heads: int) -> Tensor:
    """Return rows of queries or keys in the hub's order.

    A rotary embedding rotates pairs of rows. The layout stores the two rows of a pair side by side,
    the hub half a head apart.
    """
    by_head = values.view(heads, -1, 2, *values.shape[1:])
    return by_head.transpose(1, 2).reshape(values.shape)
