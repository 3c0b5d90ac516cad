"""The tokens of one packed forward: whose they are, where they belong, which of them need a token.

Shapes: T tokens of B rows, packed row after row; M candidates, the positions that need a token;
N blocks of K positions, the response of a row; L prompt positions; P pages of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedTokens:
    """The tokens of one forward over the paged cache, and which keys each of them sees.

    Block numbers never fall along a sequence, so "a key is visible iff its block is not after the
    query's" (`d2f.diffusion.layout`) is the same as "its position is before the end of the query's
    block". That end is `limits_T`; a limit never exceeds the row's end.

    Padding follows the last row's tokens: its limit is 0 and its slot lies in page 0, which no row
    owns.
    """

    positions_T: Tensor
    """Absolute position of each token, int64."""
    slots_T: Tensor
    """Cache slot that each token's key and value are written to: page * page_size + offset."""
    limits_T: Tensor
    """Each token sees the keys of its row at positions below this, int64."""
    starts_B: Tensor
    """Index of each row's first token among the T, int64."""
    counts_B: Tensor
    """Tokens of each row, 0 for a row that is not part of this forward, int64."""
    ends_B: Tensor
    """Positions of each row that hold keys once this forward has written its own, int64."""
    pages_BP: Tensor
    """Page table: number of the page that holds positions p * page_size …, int32."""
    page_size: int
    """Positions of a page."""
    max_count: int
    """No row has more tokens than this; known on the host."""
    max_end: int
    """No row ends later than this; known on the host."""


class PackableRows(Protocol):
    """The tensors of the rows that packing reads, all int64 but the page table."""

    prompt_B: Tensor
    """Tokens of the prompt."""
    size_B: Tensor
    """Block size."""
    start_B: Tensor
    """First position that the forward computes."""
    end_B: Tensor
    """First position that it does not compute."""
    done_B: Tensor
    """1 where there is nothing to do, or no sequence."""
    tokens_BNK: Tensor
    """The response; the mask token where not decoded."""
    prompt_BL: Tensor
    """The prompt."""
    pages_BP: Tensor
    """Page table, int32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Packing:
    """The tokens of a forward and whose they are."""

    packed: PackedTokens
    ids_T: Tensor
    """Token ids, int64."""
    row_T: Tensor
    """The row of each token, int64; of padding the last row."""
    response_T: Tensor
    """Position within the response, negative in the prompt, int64."""
    inside_T: Tensor
    """Whether a token is none of the padding."""
    runs_B: Tensor
    """Rows that take part."""


def pack_tokens(
    rows: PackableRows,
    *,
    num_tokens: int,
    page_size: int,
    max_count: int,
    max_end: int,
    prefill: bool,
    causal: bool,
) -> Packing:
    """Lay out positions `start_B` to `end_B` of the rows.

    Rows whose tokens do not fit into T any more sit this forward out, and all rows behind them; so
    does, alone, a row of more than `max_count` tokens: the host learns late that a row sat out, and
    may think that it has fewer.

    Args:
        rows: What has to be computed.
        num_tokens: T.
        page_size: Positions of a page.
        max_count: Most tokens of a row that takes part.
        max_end: No row ends later than this.
        prefill: Some row computes its prompt.
        causal: Each token sees the keys up to its own, not up to the end of its block.
    """
    device, num_rows = rows.start_B.device, len(rows.start_B)
    count_B, runs_B = _taking_part(rows, num_tokens, max_count)
    last_B = count_B.cumsum(0)
    first_B = last_B - count_B

    index_T = torch.arange(num_tokens, device=device)
    inside_T = index_T < last_B[-1]
    row_T = torch.searchsorted(last_B, index_T, right=True).clamp_max(num_rows - 1)
    facts_4B = torch.stack([rows.start_B - first_B, rows.prompt_B, rows.size_B, rows.end_B])
    offset_T, prompt_T, size_T, end_T = facts_4B[:, row_T].unbind()
    position_T = torch.where(inside_T, index_T + offset_T, 0)
    response_T = position_T - prompt_T
    # The prompt is block -1, which ends where block 0 begins.
    block_T = response_T.div(size_T, rounding_mode="floor").clamp_min(-1)
    if causal:
        visible_T = position_T + 1
    else:
        visible_T = torch.minimum(prompt_T + (block_T + 1) * size_T, end_T)
    packed = PackedTokens(
        positions_T=position_T,
        slots_T=torch.where(inside_T, _slots(rows, row_T, position_T, page_size), 0),
        limits_T=torch.where(inside_T, visible_T, 0),
        starts_B=first_B,
        counts_B=count_B,
        ends_B=torch.where(count_B > 0, rows.end_B, 0),
        pages_BP=rows.pages_BP,
        page_size=page_size,
        max_count=max_count,
        max_end=max_end,
    )
    return Packing(
        packed=packed,
        ids_T=_ids(rows, row_T, position_T, response_T, block_T, prefill),
        row_T=row_T,
        response_T=response_T,
        inside_T=inside_T,
        runs_B=runs_B,
    )


def _ids(
    rows: PackableRows,
    row_T: Tensor,
    position_T: Tensor,
    response_T: Tensor,
    block_T: Tensor,
    prefill: bool,
) -> Tensor:
    """Token ids, of the response and, in a prefill, of the prompt."""
    grid_BR = rows.tokens_BNK.flatten(1)
    place_T = block_T * (rows.tokens_BNK.shape[2] - rows.size_B[row_T]) + response_T
    ids_T = grid_BR[row_T, place_T.clamp(0, grid_BR.shape[1] - 1)]
    if not prefill:
        return ids_T
    at_T = position_T.clamp_max(rows.prompt_BL.shape[1] - 1)
    return torch.where(response_T < 0, rows.prompt_BL[row_T, at_T], ids_T)


def _taking_part(rows: PackableRows, num_tokens: int, max_count: int) -> tuple[Tensor, Tensor]:
    """Tokens of each row in this forward, and which rows take part."""
    idle_B = rows.done_B > 0
    count_B = torch.where(idle_B, 0, rows.end_B - rows.start_B)
    short_B = count_B <= max_count
    fits_B = short_B & (torch.where(short_B, count_B, 0).cumsum(0) <= num_tokens)
    return torch.where(fits_B, count_B, 0), fits_B & ~idle_B


def _slots(rows: PackableRows, row_T: Tensor, position_T: Tensor, page_size: int) -> Tensor:
    """Cache slots of the positions."""
    page_T = rows.pages_BP[row_T, position_T // page_size]
    return page_T * page_size + position_T % page_size


@dataclass(frozen=True, eq=False)
class Candidates:
    """The positions of a forward that need a token, in order; behind the last none is live."""

    live_M: Tensor
    """Whether the candidate exists, bool."""
    index_M: Tensor
    """Place of the candidate among the T tokens, int64."""
    row_M: Tensor
    """Row of the candidate, int64."""
    response_M: Tensor
    """Position of the candidate within the response, int64."""
    position_M: Tensor
    """Absolute position of the candidate, int64."""
    place_M: Tensor
    """Place of the candidate in the flat grid (B * N * K), int64; one past the grid if not live."""
    number_M: Tensor
    """Number of candidates of the same row that come before this one, int64."""


def find_candidates(
    packing: Packing, rows: PackableRows, *, mask_token_id: int, num_candidates: int
) -> Candidates:
    """The masked positions of the response among the packed tokens, at most M of them.

    Args:
        packing: From `pack_tokens`.
        rows: The same rows.
        mask_token_id: What a position holds that needs a token.
        num_candidates: M; there must not be more.
    """
    needed_T = packing.inside_T & (packing.response_T >= 0) & (packing.ids_T == mask_token_id)
    count_T = needed_T.cumsum(0)
    number_M = torch.arange(1, num_candidates + 1, device=count_T.device)
    live_M = number_M <= count_T[-1]
    # The m-th candidate is where the count reaches m.
    index_M = torch.searchsorted(count_T, number_M).clamp_max(len(count_T) - 1)
    row_M, response_M = packing.row_T[index_M], packing.response_T[index_M]
    size_M = rows.size_B[row_M]
    block_size, per_row = rows.tokens_BNK.shape[2], rows.tokens_BNK[0].numel()
    place_M = response_M // size_M * (block_size - size_M) + response_M + row_M * per_row
    before_T = torch.nn.functional.pad(count_T, (1, 0))
    first_B = packing.packed.starts_B.clamp_max(len(count_T))
    return Candidates(
        live_M=live_M,
        index_M=index_M,
        row_M=row_M,
        response_M=response_M,
        position_M=packing.packed.positions_T[index_M],
        place_M=torch.where(live_M, place_M, rows.tokens_BNK.numel()),
        number_M=number_M - 1 - before_T[first_B][row_M],
    )
