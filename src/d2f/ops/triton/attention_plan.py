"""The plan of the attention kernels: tiles of queries and splits of keys for each program.

Where the keys of a row are split follows from its end alone, never from the batch or the pages.

Shapes: T packed tokens of B rows, I tiles, N query heads, K key/value heads, M rows of a tile
(token, head).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2f.ops.packed import PackedTokens

SPLIT_KEYS = tl.constexpr(256)
MEDIUM_END, MEDIUM_SPLIT_KEYS = tl.constexpr(2048), tl.constexpr(1024)
LONG_END, LONG_SPLIT_KEYS = tl.constexpr(32768), tl.constexpr(4096)
"""Keys of a split, for rows up to the end and for longer ones: 32 splits at 131,072 keys."""

BUSY_PROGRAMS = 264
"""Tiles and heads that keep the GPU busy without splits: two programs for each of 132 SMs."""

TILE_FIELDS = tl.constexpr(8)
"""Numbers that describe a tile: its first token, its tokens, its row, its largest limit and the
keys of a split; the rest is unused, so that a tile lies in one sector of memory."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionPlan:
    """The plan of one forward's attention, which all its layers share."""

    packed: PackedTokens
    num_kv_heads: int
    tile_rows: int
    tile_tokens: int
    """Most tokens of a tile."""
    most_splits: int
    """No row has more splits than this."""
    fused: bool
    """Does one program walk all splits of its tile?"""
    tiles_IF: Tensor
    """`TILE_FIELDS` of each tile, int32; tiles that are not needed have no tokens."""
    splits_T: Tensor
    """Splits that each token sees, int32."""


def split_count(end: int) -> int:
    """The most splits that a row has which ends at `end` or before.

    Example:
        >>> [split_count(end) for end in (256, 257, 2048, 2049, 10_000, 131_072)]
        [1, 2, 8, 8, 10, 32]
    """
    splits = 0
    for most, size in ((MEDIUM_END, SPLIT_KEYS), (LONG_END, MEDIUM_SPLIT_KEYS)):
        splits = max(splits, triton.cdiv(min(end, most.value), size.value))
    if end > LONG_END.value:
        splits = max(splits, triton.cdiv(end, LONG_SPLIT_KEYS.value))
    return splits


def plan_attention(
    packed: PackedTokens,
    num_heads: int,
    num_kv_heads: int,
    *,
    tile_rows: int | None = None,
    fused: bool | None = None,
) -> AttentionPlan:
    """Work out once what all layers' `paged_attention` of a forward need.

    Args:
        packed: The tokens.
        num_heads: N.
        num_kv_heads: K.
        tile_rows: M, a power of two of at least 16; None: by the number of queries.
        fused: Does one program walk all splits? None: if that keeps the GPU busy.
    """
    num_tokens, batch = len(packed.limits_T), len(packed.counts_B)
    groups = num_heads // num_kv_heads
    if tile_rows is None:
        tile_rows = min(max(triton.next_power_of_2(packed.max_count * groups), 16), 64)
    tile_rows = max(tile_rows, triton.next_power_of_2(groups))
    tile_tokens = max(min(tile_rows // groups, packed.max_count), 1)
    # Each row may end in a tile that is not full, and so may the padding.
    num_tiles = min(num_tokens, num_tokens // tile_tokens + batch + 1)
    most_splits = max(split_count(packed.max_end), 1)
    if fused is None:
        filled = min(num_tiles, batch * triton.cdiv(packed.max_count, tile_tokens))
        fused = most_splits == 1 or filled * num_kv_heads >= BUSY_PROGRAMS
    device = packed.limits_T.device
    tiles_IF = torch.empty(num_tiles, TILE_FIELDS.value, device=device, dtype=torch.int32)
    splits_T = torch.empty(num_tokens, device=device, dtype=torch.int32)
    if num_tiles:
        block = 16
        _plan_tiles[(triton.cdiv(num_tiles, block),)](
            packed.starts_B, packed.counts_B, packed.ends_B, packed.limits_T, tiles_IF, splits_T,
            batch, num_tokens, num_tiles,
            TILE_TOKENS=tile_tokens, BLOCK_I=block, BLOCK_B=triton.next_power_of_2(batch + 1),
            BLOCK_T=triton.next_power_of_2(tile_tokens),
        )  # fmt: skip
    return AttentionPlan(
        packed=packed,
        num_kv_heads=num_kv_heads,
        tile_rows=tile_rows,
        tile_tokens=tile_tokens,
        most_splits=most_splits,
        fused=fused,
        tiles_IF=tiles_IF,
        splits_T=splits_T,
    )


@triton.jit(do_not_specialize=["batch", "num_tokens", "num_tiles"])
def _plan_tiles(
    starts_B, counts_B, ends_B, limits_T, tiles_IF, splits_T, batch, num_tokens, num_tiles,
    TILE_TOKENS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Cut the rows into tiles: those of the first row, of the second, …, of the padding."""
    row_B = tl.arange(0, BLOCK_B)
    count_B = tl.load(counts_B + row_B, mask=row_B < batch, other=0).to(tl.int32)
    used = tl.sum(count_B)
    # After the last row comes that of the padding.
    count_B = tl.where(row_B == batch, num_tokens - used, count_B)
    tiles_B = (count_B + TILE_TOKENS - 1) // TILE_TOKENS
    until_B = tl.cumsum(tiles_B, 0)

    tile_I = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    before_IB = until_B[None, :] <= tile_I[:, None]
    row_I = tl.sum(before_IB.to(tl.int32), 1)
    offset_I = (tile_I - tl.sum(tl.where(before_IB, tiles_B[None, :], 0), 1)) * TILE_TOKENS
    own_IB = row_B[None, :] == row_I[:, None]
    left_I = tl.sum(tl.where(own_IB, count_B[None, :], 0), 1) - offset_I
    tokens_I = tl.minimum(tl.maximum(left_I, 0), TILE_TOKENS)
    real_I = row_I < batch
    start_I = tl.load(starts_B + row_I, mask=real_I, other=0).to(tl.int32)
    first_I = tl.where(real_I, start_I, used) + offset_I
    end_I = tl.load(ends_B + row_I, mask=real_I, other=0).to(tl.int32)
    split_I = tl.where(end_I <= MEDIUM_END, SPLIT_KEYS, MEDIUM_SPLIT_KEYS)
    split_I = tl.where(end_I <= LONG_END, split_I, LONG_SPLIT_KEYS)

    offset_T = tl.arange(0, BLOCK_T)
    token_IT = first_I[:, None] + offset_T[None, :]
    used_IT = offset_T[None, :] < tokens_I[:, None]
    seen_IT = used_IT & real_I[:, None]
    limit_IT = tl.load(limits_T + token_IT, mask=seen_IT, other=0).to(tl.int32)
    splits_IT = (limit_IT + split_I[:, None] - 1) // split_I[:, None]
    tl.store(splits_T + token_IT, splits_IT, mask=used_IT)

    mask_I = tile_I < num_tiles
    tile_I = tiles_IF + tile_I * TILE_FIELDS
    tl.store(tile_I, first_I, mask=mask_I)
    tl.store(tile_I + 1, tokens_I, mask=mask_I)
    tl.store(tile_I + 2, row_I, mask=mask_I)
    tl.store(tile_I + 3, tl.max(limit_IT, 1), mask=mask_I)
    tl.store(tile_I + 4, split_I, mask=mask_I)
