"""Rotary position embedding in the half-rotation layout, with llama3 frequency scaling.

Shapes: B sequences, L positions, N heads, H head dimension; of a packed forward, T tokens, N query
heads, K key/value heads, S cache slots, E = (N + 2K) * H.
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


def rope_and_write(
    qkv_TE: Tensor,
    cos_TH: Tensor,
    sin_TH: Tensor,
    kv_2SKH: Tensor,
    slots_T: Tensor,
    num_heads: int,
) -> Tensor:
    """Rotate the queries and keys of a packed projection; write its keys and values to the cache.

    Args:
        qkv_TE: N query heads, then K key heads, then K value heads of each token.
        cos_TH: Cosines; the rotation is computed in their dtype.
        sin_TH: Sines.
        kv_2SKH: Keys and values of a layer, written in place.
        slots_T: Slot of each token, int64. Of tokens with the same slot, any may win.
        num_heads: N.

    Returns:
        The rotated queries: (T, N, H).

    Example:
        >>> kv = torch.zeros(2, 4, 1, 2)
        >>> rope_and_write(
        ...     torch.tensor([[1.0, 2, 3, 4, 5, 6]]), torch.zeros(1, 2), torch.ones(1, 2),
        ...     kv, torch.tensor([3]), num_heads=1,
        ... )
        tensor([[[-2.,  1.]]])
        >>> kv[:, 3].flatten()
        tensor([-4.,  3.,  5.,  6.])
    """
    kv_heads, head_dim = kv_2SKH.shape[2:]
    heads = qkv_TE.view(qkv_TE.shape[0], -1, head_dim)
    turning, values_TKH = heads.split((num_heads + kv_heads, kv_heads), dim=1)
    # Queries and keys turn in one go, as at the shipped model's width a call costs more than its
    # arithmetic.
    x = turning.to(cos_TH.dtype)
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    out = (x * cos_TH.unsqueeze(1)).addcmul_(turned, sin_TH.unsqueeze(1)).to(qkv_TE.dtype)
    q_TNH, k_TKH = out.split((num_heads, kv_heads), dim=1)
    keys_SKH, values_SKH = kv_2SKH.unbind()
    keys_SKH.index_copy_(0, slots_T, k_TKH)
    values_SKH.index_copy_(0, slots_T, values_TKH)
    return q_TNH
