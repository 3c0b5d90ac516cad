"""Block-causal attention over the paged cache: the Triton kernels.

Flash-decoding: a program answers a tile of one row's queries for one key head (with the G query
heads that share it) over one split of the keys; a second kernel merges the splits in their order.
Where tiles alone keep the GPU busy, a program walks all splits of its tile instead and merges
them itself by the same arithmetic, so both give the same numbers.

Shapes: T packed tokens of B rows, I tiles, N query heads, K key/value heads, G = N / K, H head
size, M rows of a tile (token, head), S keys of a block.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2f.ops.triton.attention_plan import SPLIT_KEYS, TILE_FIELDS, AttentionPlan
from d2f.ops.triton.launch import begin, early_start, gdc_launch_dependents, gdc_wait


def _tuning(tile_rows: int, dtype: torch.dtype) -> dict[str, int]:
    """The keys of a block (a power of two that divides `SPLIT_KEYS`) and the launch for tiles."""
    small = tile_rows <= 16
    if dtype == torch.float32:
        # IEEE products run outside the tensor cores, on registers.
        return {"BLOCK_S": 16, "num_warps": 4 if small else 8, "num_stages": 2}
    # Keys wait for their page's number, so that five stages hold two blocks of keys and three one.
    num_warps = 8 if tile_rows >= 128 else 4
    return {"BLOCK_S": 64, "num_warps": num_warps, "num_stages": 5 if small else 3}


def paged_attention(q_TNH: Tensor, kv_2SKH: Tensor, plan: AttentionPlan) -> Tensor:
    """Do as `d2f.ops.paged_attention.paged_attention`; queries, keys and values are contiguous."""
    num_tokens, num_heads, head_dim = q_TNH.shape
    out_TNH = torch.empty_like(q_TNH)
    if num_tokens > 0:
        if plan.fused:
            _launch_attend(q_TNH, kv_2SKH, out_TNH, out_TNH, plan)
        else:
            size = (plan.most_splits, num_tokens, num_heads)
            acc_STNH = q_TNH.new_empty(*size, head_dim, dtype=torch.float32)
            sums_2STN = q_TNH.new_empty(2, *size, dtype=torch.float32)
            _launch_attend(q_TNH, kv_2SKH, acc_STNH, sums_2STN, plan)
            _launch_merge(acc_STNH, sums_2STN, out_TNH, plan)
    return out_TNH.view(num_tokens, num_heads * head_dim)


def _launch_attend(
    q_TNH: Tensor, kv_2SKH: Tensor, out: Tensor, sums: Tensor, plan: AttentionPlan
) -> None:
    num_tokens, num_heads, head_dim = q_TNH.shape
    packed, splits = plan.packed, 1 if plan.fused else plan.most_splits
    _attend[(len(plan.tiles_IF), plan.num_kv_heads, splits)](
        q_TNH, kv_2SKH, out, sums, plan.tiles_IF, packed.limits_T, packed.pages_BP,
        packed.pages_BP.stride(0), kv_2SKH.stride(0), num_tokens,
        math.log2(math.e) / math.sqrt(head_dim),
        PAGE_SIZE=packed.page_size, NUM_HEADS=num_heads, NUM_KV_HEADS=plan.num_kv_heads,
        HEAD_DIM=head_dim, BLOCK_H=max(triton.next_power_of_2(head_dim), 16),
        BLOCK_M=plan.tile_rows, FUSED=plan.fused,
        PRECISION="ieee" if q_TNH.dtype == torch.float32 else "tf32",
        **_tuning(plan.tile_rows, q_TNH.dtype), **early_start(q_TNH),
    )  # fmt: skip


def _launch_merge(
    acc_STNH: Tensor, sums_2STN: Tensor, out_TNH: Tensor, plan: AttentionPlan
) -> None:
    num_tokens, num_heads, head_dim = out_TNH.shape
    block = 4
    _merge_splits[(triton.cdiv(num_tokens * num_heads, block),)](
        acc_STNH, sums_2STN, plan.splits_T, out_TNH, num_tokens * num_heads,
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_H=triton.next_power_of_2(head_dim),
        SPLITS=plan.most_splits, BLOCK_R=block, num_warps=4, **early_start(out_TNH),
    )  # fmt: skip


@triton.jit
def _merge(acc_a, max_a, sum_a, acc_b, max_b, sum_b):
    """Join the softmax over some keys with that over further ones."""
    top = tl.maximum(max_a, max_b)
    # Without any key yet both are -inf, whose difference is NaN.
    base = tl.where(top == float("-inf"), 0.0, top)
    scale_a = tl.exp2(max_a - base)
    scale_b = tl.exp2(max_b - base)
    # Spelt out, so that every kernel rounds alike.
    total = tl.fma(sum_a, scale_a, sum_b * scale_b)
    factor_a = tl.broadcast_to(scale_a[:, None], acc_a.shape)
    return tl.fma(acc_a, factor_a, acc_b * scale_b[:, None]), top, total


@triton.jit
def _finish(acc, total):
    """The weighted mean; zero where no key was seen."""
    return acc / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def _load_heads(starts, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr):
    """The HEAD_DIM numbers at each of `starts`, with zeros up to BLOCK_H."""
    offset_H = tl.arange(0, BLOCK_H)
    numbers = starts[:, None] + offset_H[None, :]
    if BLOCK_H == HEAD_DIM:
        heads = tl.load(numbers)
    else:
        heads = tl.load(numbers, mask=(offset_H < HEAD_DIM)[None, :], other=0.0)
    return heads


@triton.jit
def _prefetch_keys(
    kv_head, value_stride, pages, start, limit,
    PAGE_SIZE: tl.constexpr, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Ask for the first keys and values of a split, 128 bytes a request; a hint, nothing more."""
    LINE: tl.constexpr = 1024 // kv_head.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = (HEAD_DIM + LINE - 1) // LINE
    # Two requests of each key, as many keys as a short split has.
    request = tl.arange(0, SPLIT_KEYS * 2)
    position = tl.maximum(tl.minimum(start + request % SPLIT_KEYS, limit - 1), 0)
    # A tile of padding has no limit and no row of pages.
    page = tl.load(pages + position // PAGE_SIZE, mask=position < limit, other=0).to(tl.int64)
    line = tl.minimum(request // SPLIT_KEYS, LINES - 1) * LINE
    place = kv_head + (page * PAGE_SIZE + position % PAGE_SIZE) * STRIDE + line
    for offset in tl.static_range(2):
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [(place + offset * value_stride).to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _attend_split(
    q_MH, kv_head, value_stride, pages, limit_M, start, split_keys, limit, scale,
    PAGE_SIZE: tl.constexpr, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax over the keys of the split at `start`: sum of values, largest score, sum."""
    end = tl.minimum(start + split_keys, limit)
    max_M = tl.full([q_MH.shape[0]], float("-inf"), tl.float32)
    sum_M = tl.zeros([q_MH.shape[0]], tl.float32)
    acc_MH = tl.zeros([q_MH.shape[0], q_MH.shape[1]], tl.float32)
    for block in range(start, end, BLOCK_S):
        position_S = block + tl.arange(0, BLOCK_S)
        # Past the end, the last key again: a slot that was never written may hold NaN, which a
        # weight of zero does not undo.
        read_S = tl.minimum(position_S, end - 1)
        page_S = tl.load(pages + read_S // PAGE_SIZE).to(tl.int64)
        slot_S = page_S * PAGE_SIZE + read_S % PAGE_SIZE
        k_SH = _load_heads(kv_head + slot_S * STRIDE, HEAD_DIM, q_MH.shape[1])
        score_MS = tl.dot(q_MH, tl.trans(k_SH), input_precision=PRECISION)
        score_MS = tl.where(position_S[None, :] < limit_M[:, None], score_MS, float("-inf"))
        top_M = tl.maximum(max_M, tl.max(score_MS, 1) * scale)
        base_M = tl.where(top_M == float("-inf"), 0.0, top_M)
        p_MS = tl.exp2(score_MS * scale - base_M[:, None])
        fade_M = tl.exp2(max_M - base_M)
        sum_M = tl.fma(sum_M, fade_M, tl.sum(p_MS, 1))
        v_SH = _load_heads(kv_head + value_stride + slot_S * STRIDE, HEAD_DIM, q_MH.shape[1])
        acc_MH = acc_MH * fade_M[:, None]
        acc_MH = tl.dot(p_MS.to(v_SH.dtype), v_SH, acc_MH, input_precision=PRECISION)
        max_M = top_M
    return acc_MH, max_M, sum_M


@triton.jit
def _attend_all(
    q_MH, kv_head, value_stride, pages, limit_M, split_keys, limit, scale,
    PAGE_SIZE: tl.constexpr, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax over all splits: sum of values, sum."""
    max_M = tl.full([q_MH.shape[0]], float("-inf"), tl.float32)
    sum_M = tl.zeros([q_MH.shape[0]], tl.float32)
    acc_MH = tl.zeros([q_MH.shape[0], q_MH.shape[1]], tl.float32)
    for start in range(0, limit, split_keys):
        new_MH, new_max_M, new_sum_M = _attend_split(
            q_MH, kv_head, value_stride, pages, limit_M, start, split_keys, limit,
            scale, PAGE_SIZE, STRIDE, HEAD_DIM, BLOCK_S, PRECISION,
        )  # fmt: skip
        acc_MH, max_M, sum_M = _merge(acc_MH, max_M, sum_M, new_MH, new_max_M, new_sum_M)
    return acc_MH, sum_M


@triton.jit(do_not_specialize=["pages_stride", "num_tokens"])
def _attend(
    q_TNH,
    kv_2SKH,
    out,  # (T, N, H) if FUSED, else (splits, T, N, H) in fp32
    sums,  # unused if FUSED, else (2, splits, T, N): largest scores and sums
    tiles_IF,
    limits_T,
    pages_BP,
    pages_stride,
    value_stride,
    num_tokens,
    scale,
    PAGE_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    FUSED: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Answer a tile over one split of its keys, or, if FUSED, over all of them."""
    GROUPS: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    STRIDE: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    if EARLY:
        gdc_launch_dependents()
    # Tiles, limits and pages were written before the embedding of this forward, which does not
    # start early; only the queries and the new keys come from the kernel before.
    tile = tiles_IF + tl.program_id(0) * TILE_FIELDS
    head, split = tl.program_id(1), tl.program_id(2)
    first, tokens, row = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    limit, split_keys = tl.load(tile + 3), tl.load(tile + 4)
    # A tile of padding sees no keys. Fused, it is answered with zeros all the same.
    if (tokens == 0) if FUSED else (split * split_keys >= limit):
        return
    row_M = tl.arange(0, BLOCK_M)
    token_M = first + row_M // GROUPS
    used_M = row_M < tokens * GROUPS
    query_M = token_M.to(tl.int64) * NUM_HEADS + head * GROUPS + row_M % GROUPS
    offset_H = tl.arange(0, BLOCK_H)
    query_MH = query_M[:, None] * HEAD_DIM + offset_H[None, :]
    used_MH = used_M[:, None] & (offset_H < HEAD_DIM)[None, :]
    limit_M = tl.load(limits_T + token_M, mask=used_M, other=0).to(tl.int32)
    pages = pages_BP + row.to(tl.int64) * pages_stride
    kv_head = kv_2SKH + head * HEAD_DIM
    if EARLY:
        _prefetch_keys(
            kv_head, value_stride, pages, split * split_keys, limit, PAGE_SIZE, STRIDE, HEAD_DIM
        )
        gdc_wait()
    q_MH = tl.load(q_TNH + query_MH, mask=used_MH, other=0.0)
    if FUSED:
        acc_MH, sum_M = _attend_all(
            q_MH, kv_head, value_stride, pages, limit_M, split_keys, limit,
            scale, PAGE_SIZE, STRIDE, HEAD_DIM, BLOCK_S, PRECISION,
        )  # fmt: skip
        acc_MH = _finish(acc_MH, sum_M)
        tl.store(out + query_MH, acc_MH.to(out.dtype.element_ty), mask=used_MH)
    else:
        acc_MH, max_M, sum_M = _attend_split(
            q_MH, kv_head, value_stride, pages, limit_M, split * split_keys, split_keys, limit,
            scale, PAGE_SIZE, STRIDE, HEAD_DIM, BLOCK_S, PRECISION,
        )  # fmt: skip
        size = tl.cast(num_tokens, tl.int64) * NUM_HEADS
        tl.store(out + split * size * HEAD_DIM + query_MH, acc_MH, mask=used_MH)
        sums += split * size + query_M
        tl.store(sums, max_M, mask=used_M)
        tl.store(sums + tl.num_programs(2) * size, sum_M, mask=used_M)


@triton.jit(do_not_specialize=["num_rows"])
def _merge_splits(
    acc_STNH, sums_2STN, splits_T, out_TNH, num_rows,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Merge the splits of some rows of (T, N), in their order."""
    begin(EARLY)
    row_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    used_R = row_R < num_rows
    offset_H = tl.arange(0, BLOCK_H)
    inside_1H = (offset_H < HEAD_DIM)[None, :]
    row_RH = row_R[:, None] * HEAD_DIM + offset_H[None, :]
    splits_R = tl.load(splits_T + row_R // NUM_HEADS, mask=used_R, other=0)
    size = tl.cast(num_rows, tl.int64)
    max_R = tl.full([BLOCK_R], float("-inf"), tl.float32)
    sum_R = tl.zeros([BLOCK_R], tl.float32)
    acc_RH = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    # Unrolled, so that the loads of all splits are under way at once.
    for split in tl.static_range(SPLITS):
        seen_R = split < splits_R
        sums = sums_2STN + split * size + row_R
        new_max_R = tl.load(sums, mask=seen_R, other=float("-inf"))
        new_sum_R = tl.load(sums + SPLITS * size, mask=seen_R, other=0.0)
        acc = acc_STNH + split * size * HEAD_DIM + row_RH
        new_RH = tl.load(acc, mask=seen_R[:, None] & inside_1H, other=0.0)
        acc_RH, max_R, sum_R = _merge(acc_RH, max_R, sum_R, new_RH, new_max_R, new_sum_R)
    out_RH = _finish(acc_RH, sum_R).to(out_TNH.dtype.element_ty)
    tl.store(out_TNH + row_RH, out_RH, mask=used_R[:, None] & inside_1H)
