"""Rotary embedding and the write to the cache in one kernel.

Shapes: T tokens, E = (N + 2K) * H packed projection, N query heads, K key/value heads, H head size,
S cache slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2f.ops.triton.launch import begin, early_start

HEADS = 8
"""Heads of a program."""


@triton.jit
def _rope_and_write_kernel(
    qkv_ptr, cos_ptr, sin_ptr, kv_ptr, slots_ptr, q_ptr, qkv_stride, values_offset, slot_stride, N,
    K,
    H: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = column < H // 2
    exists = (head < N + 2 * K) & inside
    begin(EARLY)
    first_ptr = qkv_ptr + token * qkv_stride + head * H + column
    first = tl.load(first_ptr, exists, other=0.0)
    second = tl.load(first_ptr + H // 2, exists, other=0.0)
    table = token * H + column
    cos = tl.load(cos_ptr + table, inside, other=0.0)
    sin = tl.load(sin_ptr + table, inside, other=0.0)
    cos_2 = tl.load(cos_ptr + table + H // 2, inside, other=0.0)
    sin_2 = tl.load(sin_ptr + table + H // 2, inside, other=0.0)
    turned = _rotate(first, -second.to(tl.float32), cos, sin)
    turned_2 = _rotate(second, first.to(tl.float32), cos_2, sin_2)
    is_value = head >= N + K
    first = tl.where(is_value, first, turned)
    second = tl.where(is_value, second, turned_2)

    is_query = head < N
    place = q_ptr + (token * N + head) * H + column
    tl.store(place, first, exists & is_query)
    tl.store(place + H // 2, second, exists & is_query)
    # Keys and values of a slot lie `values_offset` apart.
    kv_head = tl.where(is_value, head - N - K, head - N)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    place = kv_ptr + slot * slot_stride + kv_head * H + column
    place += tl.where(is_value, values_offset, 0).to(tl.int64)
    tl.store(place, first, exists & (head >= N))
    tl.store(place + H // 2, second, exists & (head >= N))


@triton.jit
def _rotate(x, partner, cos, sin):
    # The first product is rounded to the tables' dtype, as the twin rounds it.
    straight = (x.to(tl.float32) * cos.to(tl.float32)).to(cos.dtype).to(tl.float32)
    return (straight + partner * sin.to(tl.float32)).to(cos.dtype).to(x.dtype)


def rope_and_write(
    qkv_TE: Tensor,
    cos_TH: Tensor,
    sin_TH: Tensor,
    kv_2SKH: Tensor,
    slots_T: Tensor,
    num_heads: int,
) -> Tensor:
    """Do as `d2f.ops.rope.rope_and_write`; rows may lie apart, the numbers of a row may not."""
    kv_heads, head_dim = kv_2SKH.shape[2:]
    num_tokens = qkv_TE.shape[0]
    q_TNH = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv_TE.dtype, device=qkv_TE.device)
    _rope_and_write_kernel[(num_tokens, triton.cdiv(num_heads + 2 * kv_heads, HEADS))](
        qkv_TE, cos_TH, sin_TH, kv_2SKH, slots_T, q_TNH, qkv_TE.stride(0), kv_2SKH.stride(0),
        kv_2SKH.stride(1), num_heads, kv_heads,
        H=head_dim, HEADS=HEADS, HALF=triton.next_power_of_2(head_dim // 2), **early_start(qkv_TE),
    )  # fmt: skip
    return q_TNH
