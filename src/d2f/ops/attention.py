"""Grouped-query attention under a visibility mask.

Shapes: B sequences, L queries, S keys, N query heads, K key/value heads, G = N / K, H head size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(q_BLNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask_B1RS: Tensor | None) -> Tensor:
    """Softmax attention: (B, L, N * H).

    The G query heads that share a key head are laid out as G * L queries of it, so that keys and
    values are never repeated. `mask_B1RS` comes from `group_mask` (R = G * L); None: all visible.
    """
    batch, length, num_heads, head_dim = q_BLNH.shape
    kv_heads = k_BSKH.shape[2]
    groups = num_heads // kv_heads
    q_BKRH = (
        q_BLNH.view(batch, length, kv_heads, groups, head_dim)
        .permute(0, 2, 3, 1, 4)
        .reshape(batch, kv_heads, groups * length, head_dim)
    )
    out_BKRH = F.scaled_dot_product_attention(
        q_BKRH, k_BSKH.transpose(1, 2), v_BSKH.transpose(1, 2), attn_mask=mask_B1RS
    )
    return (
        out_BKRH.view(batch, kv_heads, groups, length, head_dim)
        .permute(0, 3, 1, 2, 4)
        .reshape(batch, length, num_heads * head_dim)
    )


def group_mask(visible_BLS: Tensor, groups: int) -> Tensor:
    """Repeat a visibility mask for the G query heads of each key head: (B, 1, G * L, S)."""
    return visible_BLS.repeat(1, groups, 1)[:, None]
