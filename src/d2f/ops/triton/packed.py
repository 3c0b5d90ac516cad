"""The tokens of a packed forward and its candidates, in one kernel each.

Shapes: T tokens of B rows; M candidates; N blocks of K positions; L prompt positions; P pages of a
row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2f.ops.packed import Candidates, PackableRows, PackedTokens, Packing
from d2f.ops.triton.launch import begin, early_start

PAIRS = 8192
"""Pairs of a token and a row that a program compares, at most."""
MOST_TOKENS = 64
"""Most tokens of a program that packs."""
LEAST_SCANNED = 16
SCANNED_TOKENS = 1024
"""Most tokens of a program that looks for candidates."""


@triton.jit(
    do_not_specialize=[
        "grid_stride", "prompts_stride", "pages_stride", "tokens_stride", "facts_stride",
        "num_rows", "num_tokens", "block_size", "grid_size", "prompt_length",
        "max_count",
    ]
)  # fmt: skip
def _pack_kernel(
    prompt_ptr, size_ptr, start_ptr, end_ptr, done_ptr,
    grid_ptr, grid_stride, prompts_ptr, prompts_stride, pages_ptr, pages_stride,
    tokens_ptr, tokens_stride, inside_ptr, facts_ptr, facts_stride, runs_ptr,
    num_rows, num_tokens, block_size, grid_size, prompt_length, page_size,
    max_count,
    PREFILL: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    index_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    exists_T = index_T < num_tokens
    begin(EARLY)
    row_B = tl.arange(0, BLOCK_B)
    exists_B = row_B < num_rows
    # Every program lays out all rows, which is faster than to wait for one that does.
    done_B = tl.load(done_ptr + row_B, exists_B, other=1) > 0
    end_B = tl.load(end_ptr + row_B, exists_B, other=0)
    wanted_B = (end_B - tl.load(start_ptr + row_B, exists_B, other=0)).to(tl.int32)
    wanted_B = tl.where(done_B, 0, wanted_B)
    short_B = wanted_B <= max_count
    fits_B = short_B & (tl.cumsum(tl.where(short_B, wanted_B, 0), 0) <= num_tokens)
    count_B = tl.where(fits_B, wanted_B, 0)
    last_B = tl.cumsum(count_B, 0)
    if tl.program_id(0) == 0:
        tl.store(facts_ptr + row_B, (last_B - count_B).to(tl.int64), exists_B)
        tl.store(facts_ptr + facts_stride + row_B, count_B.to(tl.int64), exists_B)
        end_B = tl.where(count_B > 0, end_B, 0)
        tl.store(facts_ptr + 2 * facts_stride + row_B, end_B, exists_B)
        tl.store(runs_ptr + row_B, fits_B & (done_B == 0), exists_B)

    inside_T = index_T < tl.sum(count_B, 0)
    before_TB = (last_B[None, :] <= index_T[:, None]) & exists_B[None, :]
    row_T = tl.minimum(tl.sum(before_TB.to(tl.int32), 1), num_rows - 1).to(tl.int64)
    first_T = tl.sum(tl.where(before_TB, count_B[None, :], 0), 1)
    prompt_T, size_T = tl.load(prompt_ptr + row_T), tl.load(size_ptr + row_T)
    position_T = tl.where(inside_T, tl.load(start_ptr + row_T) + (index_T - first_T), 0)
    response_T = position_T - prompt_T
    # The prompt is block -1. Kernels round towards zero where the twin rounds down.
    block_T = tl.where(response_T < 0, -1, response_T // size_T)
    if CAUSAL:
        visible_T = position_T + 1
    else:
        visible_T = tl.minimum(prompt_T + (block_T + 1) * size_T, tl.load(end_ptr + row_T))

    place_T = block_T * (block_size - size_T) + response_T
    place_T = tl.minimum(tl.maximum(place_T, 0), grid_size - 1)
    id_T = tl.load(grid_ptr + row_T * grid_stride + place_T, exists_T, other=0)
    if PREFILL:
        at_T = tl.minimum(position_T, prompt_length - 1)
        given_T = exists_T & (response_T < 0)
        id_T = tl.load(prompts_ptr + row_T * prompts_stride + at_T, given_T, other=id_T)
    page_T = tl.load(pages_ptr + row_T * pages_stride + position_T // page_size, exists_T, other=0)
    slot_T = page_T.to(tl.int64) * page_size + position_T % page_size
    tokens_ptr += index_T
    tl.store(tokens_ptr, position_T, exists_T)
    tl.store(tokens_ptr + tokens_stride, tl.where(inside_T, slot_T, 0), exists_T)
    tl.store(tokens_ptr + 2 * tokens_stride, tl.where(inside_T, visible_T, 0), exists_T)
    tl.store(tokens_ptr + 3 * tokens_stride, id_T, exists_T)
    tl.store(tokens_ptr + 4 * tokens_stride, row_T, exists_T)
    tl.store(tokens_ptr + 5 * tokens_stride, response_T, exists_T)
    tl.store(inside_ptr + index_T, inside_T, exists_T)


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
    """Do as `d2f.ops.packed.pack_tokens`; in each of the rows' tensors a row must be contiguous."""
    num_rows, num_blocks, block_size = rows.tokens_BNK.shape
    assert rows.tokens_BNK[0].is_contiguous() and rows.prompt_BL.stride(1) == 1
    assert rows.pages_BP.stride(1) == 1
    tokens_6T, inside_T = _columns(rows.tokens_BNK, 6, num_tokens)
    facts_3B, runs_B = _columns(rows.tokens_BNK, 3, num_rows)
    block_b = max(triton.next_power_of_2(num_rows), LEAST_SCANNED)
    block_t = min(MOST_TOKENS, max(PAIRS // block_b, 1), triton.next_power_of_2(num_tokens))
    _pack_kernel[(triton.cdiv(num_tokens, block_t),)](
        rows.prompt_B, rows.size_B, rows.start_B, rows.end_B, rows.done_B,
        rows.tokens_BNK, rows.tokens_BNK.stride(0), rows.prompt_BL, rows.prompt_BL.stride(0),
        rows.pages_BP, rows.pages_BP.stride(0),
        tokens_6T, tokens_6T.stride(0), inside_T, facts_3B, facts_3B.stride(0), runs_B,
        num_rows, num_tokens, block_size, num_blocks * block_size, rows.prompt_BL.shape[1],
        page_size, max_count, PREFILL=prefill, CAUSAL=causal, BLOCK_B=block_b, BLOCK_T=block_t,
        **early_start(tokens_6T),
    )  # fmt: skip
    position_T, slot_T, limit_T, id_T, row_T, response_T = tokens_6T.unbind()
    start_B, count_B, end_B = facts_3B.unbind()
    packed = PackedTokens(
        positions_T=position_T,
        slots_T=slot_T,
        limits_T=limit_T,
        starts_B=start_B,
        counts_B=count_B,
        ends_B=end_B,
        pages_BP=rows.pages_BP,
        page_size=page_size,
        max_count=max_count,
        max_end=max_end,
    )
    return Packing(
        packed=packed,
        ids_T=id_T,
        row_T=row_T,
        response_T=response_T,
        inside_T=inside_T,
        runs_B=runs_B,
    )


def _columns(like: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Room for `count` lists of whole numbers and one of truth values."""
    # Lists that start at even places are aligned alike, so kernels are not compiled twice.
    stride = size + size % 2
    ints = torch.empty((count, stride), dtype=torch.int64, device=like.device)[:, :size]
    return ints, torch.empty(size, dtype=torch.bool, device=like.device)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _needed(ids_ptr, response_ptr, inside_ptr, index_T, exists_T, mask_token):
    id_T = tl.load(ids_ptr + index_T, exists_T, other=0)
    response_T = tl.load(response_ptr + index_T, exists_T, other=-1)
    inside_T = tl.load(inside_ptr + index_T, exists_T, other=0) != 0
    return (inside_T & (response_T >= 0) & (id_T == mask_token)).to(tl.int32)


@triton.jit(
    do_not_specialize=[
        "out_stride", "num_tokens", "num_candidates", "mask_token", "block_size", "per_row",
        "num_places",
    ]
)  # fmt: skip
def _candidates_kernel(
    ids_ptr, row_ptr, response_ptr, position_ptr, inside_ptr, starts_ptr, size_ptr,
    out_ptr, out_stride, live_ptr,
    num_tokens, num_candidates, mask_token, block_size, per_row, num_places,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Each program counts the candidates before its tokens, then enters its own."""
    offset_T = tl.arange(0, BLOCK)
    begin(EARLY)
    block_start = tl.program_id(0) * BLOCK
    index_T = block_start + offset_T
    exists_T = index_T < num_tokens
    row_T = tl.load(row_ptr + index_T, exists_T, other=0)
    row_start_T = tl.load(starts_ptr + row_T)
    first_row_start = tl.load(starts_ptr + tl.load(row_ptr + block_start))
    count_T = tl.zeros((BLOCK,), tl.int32)
    earlier_T = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, block_start, BLOCK):
        at_T = start + offset_T
        needed_T = _needed(ids_ptr, response_ptr, inside_ptr, at_T, at_T < num_tokens, mask_token)
        count_T += needed_T
        earlier_T += tl.where(at_T < first_row_start, needed_T, 0)
    count = tl.sum(count_T, 0)
    needed_T = _needed(ids_ptr, response_ptr, inside_ptr, index_T, exists_T, mask_token)
    candidate_T = count + tl.cumsum(needed_T, 0) - needed_T
    # Candidates before the row of each token: known where the row starts, and they never fall.
    before_T = tl.where(index_T == row_start_T, candidate_T, tl.sum(earlier_T, 0))
    before_T = tl.associative_scan(before_T, 0, _larger)

    response_T = tl.load(response_ptr + index_T, exists_T, other=0)
    size_T = tl.load(size_ptr + row_T)
    place_T = response_T // size_T * (block_size - size_T) + response_T + row_T * per_row
    _enter(
        out_ptr, out_stride, live_ptr, candidate_T,
        (needed_T != 0) & (candidate_T < num_candidates), True,
        index_T, row_T, response_T, tl.load(position_ptr + index_T, exists_T, other=0), place_T,
        candidate_T - before_T,
    )  # fmt: skip
    if tl.program_id(0) == tl.num_programs(0) - 1:
        # What is not live is as the twin leaves it: the last token.
        last = num_tokens - 1
        row, response = tl.load(row_ptr + last), tl.load(response_ptr + last)
        position = tl.load(position_ptr + last)
        count += tl.sum(needed_T, 0)
        before = tl.max(before_T, 0)
        for start in range(0, num_candidates, BLOCK):
            candidate_T = start + offset_T
            _enter(
                out_ptr, out_stride, live_ptr, candidate_T,
                (candidate_T >= count) & (candidate_T < num_candidates), False,
                last, row, response, position, num_places, candidate_T - before,
            )  # fmt: skip


@triton.jit
def _enter(
    out_ptr, out_stride, live_ptr, candidate_T, exists_T, LIVE: tl.constexpr,
    index, row, response, position, place, number_T,
):  # fmt: skip
    zero_T = candidate_T.to(tl.int64) * 0
    out_ptr += candidate_T
    tl.store(live_ptr + candidate_T, zero_T == 0 if LIVE else zero_T != 0, exists_T)
    tl.store(out_ptr, zero_T + index, exists_T)
    tl.store(out_ptr + out_stride, zero_T + row, exists_T)
    tl.store(out_ptr + 2 * out_stride, zero_T + response, exists_T)
    tl.store(out_ptr + 3 * out_stride, zero_T + position, exists_T)
    tl.store(out_ptr + 4 * out_stride, zero_T + place, exists_T)
    tl.store(out_ptr + 5 * out_stride, zero_T + number_T, exists_T)


def find_candidates(
    packing: Packing, rows: PackableRows, *, mask_token_id: int, num_candidates: int
) -> Candidates:
    """Do as `d2f.ops.packed.find_candidates`."""
    num_rows, num_blocks, block_size = rows.tokens_BNK.shape
    per_row, num_tokens = num_blocks * block_size, len(packing.ids_T)
    out_6M, live_M = _columns(packing.ids_T, 6, num_candidates)
    block = min(SCANNED_TOKENS, max(triton.next_power_of_2(num_tokens), LEAST_SCANNED))
    _candidates_kernel[(triton.cdiv(num_tokens, block),)](
        packing.ids_T, packing.row_T, packing.response_T, packing.packed.positions_T,
        packing.inside_T, packing.packed.starts_B, rows.size_B,
        out_6M, out_6M.stride(0), live_M,
        num_tokens, num_candidates, mask_token_id, block_size, per_row, num_rows * per_row,
        BLOCK=block, **early_start(out_6M),
    )  # fmt: skip
    return Candidates(live_M, *out_6M.unbind())
