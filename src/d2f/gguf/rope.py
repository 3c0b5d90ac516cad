"""Rotary scaling of Llama 3, of which a GGUF holds a tensor of factors instead of the parameters.

The tensor has one factor per frequency: 1 for short wave lengths, `factor` for long ones. Between
them, 1 / factor grows linearly with the frequency.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from d2f.errors import CheckpointError
from d2f.gguf.container import Container, GGUFTensor
from d2f.gguf.layouts import ROPE_TENSOR

_LENGTH = "original_max_position_embeddings"
_COMMON = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, _LENGTH: 8192}
"""Parameters that all published Llama 3 models share."""
_TOLERANCE = 1e-3
_NOISE = 2e-5
_DECIMALS = 5
"""Decimals that survive float32, to which solved parameters are rounded."""


def rope_scaling(container: Container, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Return the entry `rope_scaling` of config.json; None if the frequencies are not scaled.

    Raises:
        CheckpointError: The frequencies are scaled in another way than Llama 3's.
    """
    file, metadata = container.file, container.metadata
    prefix = f"{metadata['general.architecture']}.rope"
    kind = metadata.get(f"{prefix}.scaling.type", "none")
    long = [name for name in container.tensors if name.startswith("rope_factors")]
    old = metadata.get(f"{prefix}.scale_linear", 1.0)
    if kind not in ("none", "llama3") or long or old != 1.0:
        told = kind if kind not in ("none", "llama3") else "longrope" if long else "linear"
        raise CheckpointError(
            f"{file}: the rotary frequencies are scaled by '{told}'; only none and llama3 are "
            "supported"
        )
    if ROPE_TENSOR in container.tensors:
        factors = _factors(container.tensors[ROPE_TENSOR])
        length = metadata.get(f"{prefix}.scaling.original_context_length")
        found = _fitted(factors, theta, head_dim, length)
        if found is None:
            raise CheckpointError(
                f"{file}: the factors in {ROPE_TENSOR} are not those of Llama 3's scaling, which "
                "is the only one supported"
            )
        return found or None
    if kind == "none":
        return None
    entries = {name: metadata.get(f"{prefix}.scaling.{name}", _COMMON.get(name)) for name in (
        "factor", "low_freq_factor", "high_freq_factor"
    )}  # fmt: skip
    length = metadata.get(f"{prefix}.scaling.original_context_length", _COMMON[_LENGTH])
    return {"rope_type": "llama3"} | entries | {_LENGTH: length}


def _factors(tensor: GGUFTensor) -> np.ndarray[Any, Any]:
    if tensor.type.name != "F32":
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name} is of type {tensor.type.name}, not F32; convert "
            "the original model again"
        )
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.offset)
        return np.frombuffer(stream.read(tensor.num_bytes), dtype="<f4").astype(np.float64)


def _fitted(
    factors: np.ndarray[Any, Any], theta: float, head_dim: int, length: int | None
) -> dict[str, Any] | None:
    """Return the scaling that gives these factors: empty if all are 1, None if none does."""
    if factors.shape != (head_dim // 2,):
        return None
    if np.allclose(factors, 1.0):
        return {}
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    entries = dict(_COMMON)
    if length is not None:
        entries[_LENGTH] = length
    factor = round(float(factors.max()), _DECIMALS)
    for found in (entries, _solved(factors, frequencies, factor, entries[_LENGTH])):
        if found is None:
            continue
        scaling = {"rope_type": "llama3", "factor": factor} | found
        if np.allclose(llama3_factors(scaling, frequencies), factors, rtol=_TOLERANCE):
            return scaling
    return None


def _solved(
    factors: np.ndarray[Any, Any], frequencies: np.ndarray[Any, Any], factor: float, length: float
) -> dict[str, Any] | None:
    """Solve for `low_freq_factor` and `high_freq_factor` from two factors between 1 and `factor`.

    Only the ratios of both parameters to `length` matter.
    """
    inside = np.flatnonzero((factors > 1.0 + _NOISE) & (factors < factor - _NOISE))
    if len(inside) < 2:
        return None
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
    turns = length * frequencies / (2 * math.pi)
    first, last = inside[0], inside[-1]
    slope = (smooth[first] - smooth[last]) / (turns[first] - turns[last])
    if not slope > 0:
        return None
    low = turns[last] - smooth[last] / slope
    return {
        "low_freq_factor": round(float(low), _DECIMALS),
        "high_freq_factor": round(float(low + 1 / slope), _DECIMALS),
        _LENGTH: length,
    }


def llama3_factors(
    scaling: dict[str, Any], frequencies: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Return the divisor that Llama 3's scaling applies to each frequency.

    Example:
        >>> scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        ...            "original_max_position_embeddings": 8192}
        >>> llama3_factors(scaling, np.array([1.0, 1e-6]))
        array([1., 8.])
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling[_LENGTH] * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)
