"""Rotary position embedding in the half-rotation layout, with llama3 frequency scaling.

Shapes: B sequences, L positions, N heads, H head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def rope_frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None
) -> Tensor:
    """Angular frequency of each pair of dimensions: (H / 2,), fp32.

    `scaling` is the table of llama3 checkpoints (`factor`, `low_freq_factor`, `high_freq_factor`,
    `original_max_position_embeddings`): wavelengths longer than the original context are
    stretched by `factor`, short ones kept, those between interpolated.

    Example:
        >>> rope_frequencies(4, 100.0)
        tensor([1.0000, 0.1000])
    """
    exponent_H = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequency_H = 1.0 / theta**exponent_H
    if scaling is None:
        return frequency_H
    factor, low, high = (
        float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor")
    )
    turns_H = float(scaling["original_max_position_embeddings"]) * frequency_H / (2 * math.pi)
    keep_H = ((turns_H - low) / (high - low)).clamp(0, 1)
    return keep_H * frequency_H + (1 - keep_H) * frequency_H / factor


def rope_tables(
    positions_BL: Tensor, frequency_H: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, L, 1, H), computed in fp32 and stored as `dtype`."""
    angle_BLH = positions_BL[..., None].float() * frequency_H
    angle_BL1H = torch.cat([angle_BLH, angle_BLH], dim=-1)[:, :, None]
    return angle_BL1H.cos().to(dtype), angle_BL1H.sin().to(dtype)


def apply_rope(x_BLNH: Tensor, cos_BL1H: Tensor, sin_BL1H: Tensor) -> Tensor:
    """Rotate each pair (i, i + H/2); computed in the dtype of the tables, returned in that of x."""
    x = x_BLNH.to(cos_BL1H.dtype)
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cos_BL1H + turned * sin_BL1H).to(x_BLNH.dtype)
