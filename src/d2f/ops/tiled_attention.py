"""Attention under block numbers in tiles, for training: FlexAttention without a dense mask.

Shapes: B sequences, L positions, Q and K tiles of queries and keys, N query heads, H head size.
Whoever calls `tiled_attention` should be compiled as a whole: only then is it one fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TILE = 128
"""Queries and keys of a tile; what FlexAttention's kernels are tuned for."""

MIN_HEAD_DIM = 16
"""Smallest head that its kernels take."""

# Beyond any block number on either side: what fills the last tile is seen by none and sees none.
_AFTER, _BEFORE = torch.iinfo(torch.int32).max, -1


def classify_tiles(blocks_BL: Tensor, first_BL: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tell which tiles are visible in part, and which as a whole: (B, Q, K) each, bool.

    A tile is empty if the smallest number of its keys exceeds the largest of its queries, whole if
    the largest of its keys does not exceed the smallest of its queries. A last tile that is not
    full of positions is never whole, as the kernels must then look at its bounds.

    With `first_BL`, the smallest number that each query sees, a tile is also empty if all numbers
    of its keys are smaller than all of those, and whole only if none is smaller than any of them.
    Where numbers grow along a row, no tile is taken for visible in part that is empty.

    Example:
        >>> partial, whole = classify_tiles(torch.arange(3 * TILE, dtype=torch.int32)[None])
        >>> partial[0].int(), whole[0].int()
        (tensor([[1, 0, 0],
                [0, 1, 0],
                [0, 0, 1]], dtype=torch.int32), tensor([[0, 0, 0],
                [1, 0, 0],
                [1, 1, 0]], dtype=torch.int32))
    """
    missing = -blocks_BL.shape[1] % TILE
    queries_BQT, keys_BKT = (
        F.pad(blocks_BL, (0, missing), value=filler).unflatten(1, (-1, TILE))
        for filler in (_BEFORE, _AFTER)
    )
    low_BQ1, high_BQ1 = queries_BQT.amin(-1)[:, :, None], queries_BQT.amax(-1)[:, :, None]
    low_B1K, high_B1K = keys_BKT.amin(-1)[:, None], keys_BKT.amax(-1)[:, None]
    whole_BQK, some_BQK = high_B1K <= low_BQ1, low_B1K <= high_BQ1
    if first_BL is not None:
        first_BQT = F.pad(first_BL, (0, missing), value=_AFTER).unflatten(1, (-1, TILE))
        whole_BQK &= low_B1K >= first_BQT.amax(-1)[:, :, None]
        some_BQK &= high_B1K >= first_BQT.amin(-1)[:, :, None]
    return some_BQK & ~whole_BQK, whole_BQK


def tiled_mask(blocks_BL: Tensor, first_BL: Tensor | None = None) -> BlockMask:
    """Make the mask that `tiled_attention` needs from the block numbers (B, L), int32.

    `first_BL`, of the same shape, is the smallest number that each query sees; None: all of them.

    Made of the smallest and largest number of each tile: (L / `TILE`)² entries, and nothing of
    size L² on the way. The host waits for nothing. It is to be made outside of what is compiled,
    and serves all layers.
    """
    from torch.nn.attention.flex_attention import BlockMask

    blocks_BL = blocks_BL.contiguous()
    length = blocks_BL.shape[1]
    partial_BQK, whole_BQK = classify_tiles(blocks_BL, first_BL)
    return BlockMask.from_kv_blocks(
        *_listed(partial_BQK),
        *_listed(whole_BQK),
        BLOCK_SIZE=TILE,
        mask_mod=_rule(blocks_BL, None if first_BL is None else first_BL.contiguous()),
        seq_lengths=(length, length),
    )


def _rule(blocks_BL: Tensor, first_BL: Tensor | None) -> Callable[..., Tensor]:
    """Whether a query sees a key, as FlexAttention asks it."""

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return blocks_BL[batch, key] <= blocks_BL[batch, query]

    if first_BL is None:
        return visible
    lowest_BL = first_BL

    def visible_in_sample(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        number = blocks_BL[batch, key]
        return (number <= blocks_BL[batch, query]) & (number >= lowest_BL[batch, query])

    return visible_in_sample


def _listed(chosen_BQK: Tensor) -> tuple[Tensor, Tensor]:
    """Count each row's chosen tiles and list them first: (B, 1, Q) and (B, 1, Q, K)."""
    chosen_B1QK = chosen_BQK[:, None].to(torch.int32)
    order_B1QK = chosen_B1QK.argsort(dim=-1, descending=True, stable=True)
    return chosen_B1QK.sum(-1, dtype=torch.int32), order_B1QK.to(torch.int32)


def tiled_attention(q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, mask: BlockMask) -> Tensor:
    """Softmax attention, K key heads each for a group of query heads: (B, L, N * H).

    The products are in the dtype of the inputs; fp32 ones are IEEE unless
    `torch.set_float32_matmul_precision` allows less.
    """
    from torch.nn.attention.flex_attention import flex_attention

    out_BNLH = flex_attention(
        q_BLNH.transpose(1, 2),
        k_BLKH.transpose(1, 2),
        v_BLKH.transpose(1, 2),
        block_mask=mask,
        enable_gqa=q_BLNH.shape[2] != k_BLKH.shape[2],
    )
    assert isinstance(out_BNLH, Tensor)
    return out_BNLH.transpose(1, 2).flatten(2)
