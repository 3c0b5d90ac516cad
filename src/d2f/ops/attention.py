"""Grouped-query attention under a visibility mask.

Shapes: B sequences, L queries, S keys, N query heads, K key/value heads, G = N / K, H head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_MASK_ENTRIES = 2**28
"""Largest mask that is made at once; longer queries are answered in parts."""


class AttentionMask:
    """Mask that says which tokens see which in one forward, for all its layers.

    Args:
        visible: Which keys the queries from one position up to another see: (B, rows, S), bool
            or added to the scores.
        size: (B, L, S), where B is that of `visible`.
        groups: G.
    """

    def __init__(
        self, visible: Callable[[int, int], Tensor], size: tuple[int, int, int], groups: int
    ) -> None:
        batch, length, num_keys = size
        self._visible, self._groups = visible, groups
        rows = min(max(MOST_MASK_ENTRIES // (batch * num_keys * groups), 1), length)
        self.parts = [(start, min(start + rows, length)) for start in range(0, length, rows)]
        """First and last query (exclusive) of each part."""
        # One part is made once for all layers; of several, none could be kept.
        self._whole = self._make(0, length) if len(self.parts) == 1 else None

    def part(self, start: int, end: int) -> Tensor:
        """The mask of a part, repeated for the G heads that share a key: (B, 1, G * rows, S)."""
        return self._make(start, end) if self._whole is None else self._whole

    def _make(self, start: int, end: int) -> Tensor:
        return self._visible(start, end).repeat(1, self._groups, 1)[:, None]


def attention(q_BLNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: AttentionMask | None) -> Tensor:
    """Softmax attention: (B, L, N * H); without a mask all see all.

    The G query heads that share a key head are laid out as G * L queries of it, so that keys and
    values are never repeated.
    """
    if mask is None:
        return _attend(q_BLNH, k_BSKH, v_BSKH, None)
    outs = [
        _attend(q_BLNH[:, start:end], k_BSKH, v_BSKH, mask.part(start, end))
        for start, end in mask.parts
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _attend(q_BLNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask_B1RS: Tensor | None) -> Tensor:
    batch, length, num_heads, head_dim = q_BLNH.shape
    kv_heads = k_BSKH.shape[2]
    groups = num_heads // kv_heads
    if length > 1:
        q_BLNH = q_BLNH.view(batch, length, kv_heads, groups, head_dim).permute(0, 2, 3, 1, 4)
    out_BKRH = F.scaled_dot_product_attention(
        q_BLNH.reshape(batch, kv_heads, groups * length, head_dim),
        k_BSKH.transpose(1, 2),
        v_BSKH.transpose(1, 2),
        attn_mask=mask_B1RS,
    )
    if length > 1:
        out_BKRH = out_BKRH.view(batch, kv_heads, groups, length, head_dim).permute(0, 3, 1, 2, 4)
    return out_BKRH.reshape(batch, length, num_heads * head_dim)
